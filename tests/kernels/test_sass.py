"""Reading machine code: loops of listings written by hand, shapes of matrix instructions, and the clocks they cost."""

import pytest

from qgen.kernels import efficiency, roofline, sass
from qgen.kernels.sass import Instruction


def cuobjdump(*lines):
    """Lines as `cuobjdump -sass` prints them, at addresses 0, 16, 32, …; `@n` in a line is the address of line n."""
    text = "\tcode for sm_89\n\t\tFunction : kernel\n"
    for i, line in enumerate(lines):
        for target in range(len(lines)):
            line = line.replace(f"@{target}", f"0x{16 * target:x}") if "BRA" in line or "CALL" in line else line
        text += f"        /*{16 * i:04x}*/                   {line} ;             /* 0x00000a0000017a02 */\n"
        text += "                                                           /* 0x000fe40000000f00 */\n"
    return text


MMA = "IMMA.16832.S8.S8.SAT R4, R4.ROW, R6.COL, R4"


def loop_of(*lines):
    return [i.address // 16 for i in sass.mma_loop(sass.parse_sass(cuobjdump(*lines)))]


def test_listing():
    listing = sass.parse_sass(cuobjdump("MOV R1, c[0x0][0x28]", "@!P0 BRA @3", "BRA.U !UP0, @0", "EXIT"))
    assert listing == [
        Instruction(0, "MOV R1, c[0x0][0x28]"),
        Instruction(16, "@!P0 BRA 0x30", 48),
        Instruction(32, "BRA.U !UP0, 0x0", 0),
        Instruction(48, "EXIT"),
    ]


def test_opcode_drops_the_predicate():
    assert sass.opcode("@!UP0 UIADD3 UR4, UR4, 0x1, URZ") == "UIADD3"
    assert sass.opcode("IMMA.16864.S4.S4 R4, R4") == "IMMA.16864.S4.S4"


def test_simple_loop():
    assert loop_of("MOV R1, R2", MMA, "IADD3 R1, R1, 1", "@P0 BRA @1", "EXIT") == [1, 2, 3]


def test_no_loop_and_no_instructions():
    assert loop_of(MMA, "EXIT") == [] and loop_of("MOV R1, R2", "@P0 BRA @0", "EXIT") == [] and loop_of() == []


def test_inner_of_nested_loops():
    assert loop_of("MOV R1, R2", "NOP", MMA, "@P0 BRA @2", "@P1 BRA @1", "EXIT") == [2, 3]


def test_main_loop_before_a_longer_tail_loop_of_the_same_work():
    assert loop_of(MMA, "@P0 BRA @0", MMA, "FSEL R1, R2, R3, P1", "@P0 BRA @2", "EXIT") == [0, 1]


def test_loop_with_the_most_work():
    assert loop_of(MMA, "@P0 BRA @0", MMA, MMA, "NOP", "@P0 BRA @2", "EXIT") == [2, 3, 4, 5]


def test_waiting_block_behind_the_exit_belongs_to_the_loop():
    """The compiler moves spin waits out of line; the backward branch from there closes no loop of its own over the whole kernel."""
    body = ["NOP", MMA, "SYNCS.PHASECHK R1", "@!P1 BRA @7", "IADD3 R1, R1, 1", "@P0 BRA @1", "EXIT"]
    assert loop_of(*body, "SYNCS.PHASECHK R1", "@!P1 BRA @7", "BRA @4") == [1, 2, 3, 4, 5, 7, 8, 9]


def test_branch_into_a_loop_from_later_code_is_no_loop():
    """The target does not dominate the branch: irreducible, as after an early exit."""
    assert loop_of("@P0 BRA @4", "NOP", MMA, "EXIT", "NOP", "BRA @2") == []


def test_call_without_return_is_a_jump():
    assert loop_of("NOP", MMA, "@!P0 CALL.REL.NOINC @4", "BRA @1", "EXIT") == [1, 2, 3]


def test_call_that_returns_is_a_subroutine():
    listing = sass.parse_sass(
        cuobjdump("@!P0 CALL.REL.NOINC @2", "CALL.REL.NOINC @4", "NOP", "EXIT", "NOP", "RET.REL.NODEC R2")
    )
    assert [sass.is_call(i, listing) for i in listing[:3]] == [False, True, False]


def test_amd_assembly():
    text = """
kernel:
.LBB0_0:
\ts_load_dword s12, s[0:1], 0x48
.LBB0_1:                               ; =>This Inner Loop Header: Depth=1
\t.loc\t1 64 5 is_stmt 1
\tv_mfma_i32_32x32x16_i8 a[0:15], v[0:1], v[2:3], a[0:15]
\tbuffer_load_dword v1, off, s[0:3], 0
\ts_cbranch_scc1 .LBB0_1
; %bb.2:
\ts_endpgm
\t.amdhsa_next_free_vgpr 246
"""
    listing = sass.parse_amdgcn(text)
    assert len(listing) == 5 and listing[3].target == 1
    assert [sass.opcode(i.text) for i in sass.mma_loop(listing)] == [
        "v_mfma_i32_32x32x16_i8",
        "buffer_load_dword",
        "s_cbranch_scc1",
    ]


@pytest.mark.parametrize(
    "mnemonic, work",
    [
        ("HMMA.16816.F32.BF16", ("bf16", 16 * 8 * 16)),
        ("HMMA.1688.F32", ("f16", 16 * 8 * 8)),
        ("HMMA.16816.F16", ("f16", 16 * 8 * 16)),
        ("IMMA.16832.S8.S8.SAT", ("s8", 16 * 8 * 32)),
        ("IMMA.16864.U4.S4", ("s4", 16 * 8 * 64)),
        ("QMMA.16832.F16.E4M3.E4M3", ("fp8", 16 * 8 * 32)),
        ("OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X", ("fp4", 16 * 8 * 64)),
        ("IGMMA.64x128x32.S8.S8", ("s8", 64 * 128 * 32)),
        ("HGMMA.64x128x16.F32.BF16", ("bf16", 64 * 128 * 16)),
        ("QGMMA.64x64x32.F32.E4M3.E4M3", ("fp8", 64 * 64 * 32)),
        ("v_mfma_i32_32x32x16_i8", ("s8", 32 * 32 * 16)),
        ("v_mfma_f32_32x32x8_bf16_1k", ("bf16", 32 * 32 * 8)),
        ("v_wmma_i32_16x16x16_iu8", ("s8", 16 * 16 * 16)),
        ("UTCOMMA.4X", None),
        ("LOP3.LUT", None),
    ],
)
def test_work_of_a_matrix_instruction(mnemonic, work):
    assert sass.macs_of(mnemonic) == work


@pytest.mark.parametrize(
    "name, is_one",
    [("UTCHMMA gdesc[UR8]", True), ("@P0 HMMA.16816.F32 R1", True), ("WARPGROUP.ARRIVE", False), ("FMMAX R1", False)],
)
def test_what_is_a_matrix_instruction(name, is_one):
    assert sass.is_mma(name) is is_one


def loop(**counts):
    """A loop of so many of each instruction, given as mnemonics with dots written as underscores."""
    names = [name.replace("_", ".") for name, n in counts.items() for _ in range(n)]
    return [Instruction(16 * i, f"{name} R0, R1") for i, name in enumerate(names)]


def test_clocks_of_an_int8_loop():
    """32 x 4096 multiply-adds of int8: 512 a clock on A100, 256 on Ada."""
    body = loop(IMMA_16832_S8_S8=32, LOP3_LUT=72, IMAD=64, LDSM_16_M88_4=4, FFMA=10)
    a100, ada = (efficiency.loop_clocks(body, cc, 8) for cc in (80, 89))
    assert (a100.tensor, ada.tensor) == (256, 512)
    assert a100.issue == ada.issue == 182
    assert (a100.fma, ada.fma) == (2 * 64 + 2 * 10, 2 * 64 + 10)
    assert a100.alu == 144 and a100.shared == 4 * 4 * 512 / 128
    assert a100.share == ada.share == 1 and a100.limit == "tensor"


def test_clocks_bound_by_floats():
    """Three float operations per output and group on A100, where each takes two clocks."""
    clocks = efficiency.loop_clocks(loop(IMMA_16832_S8_S8=32, FFMA=64, FMUL=64, FADD=64), 80, 8)
    assert clocks.limit == "fma" and clocks.share == pytest.approx(256 / 384)


def test_wgmma_counts_for_four_warps():
    clocks = efficiency.loop_clocks(loop(IGMMA_64x128x32_S8_S8=2), 90, 8)
    assert clocks.tensor == 128  # 64 clocks of a multiprocessor each


def test_tcgen05_takes_its_work_from_the_case():
    clocks = efficiency.loop_clocks(loop(UTCOMMA_4X=4, NOP=50), 100, 4, {"fp4": 128 * 128 * 256})
    assert clocks.tensor == 128 * 128 * 256 / 4 / 4096


def test_geforce_accumulates_float16_at_twice_the_rate():
    slow, fast = (efficiency.loop_clocks(loop(**{f"QMMA_16832_{a}_E4M3_E4M3": 8}), 89, 4) for a in ("F32", "F16"))
    assert slow.tensor == 2 * fast.tensor == 8 * 32


def test_unknown_rate_gives_no_answer():
    assert efficiency.loop_clocks(loop(IMMA_16864_S4_S4=1), 90, 4) is None
    assert efficiency.rate(103, "s8") is None and efficiency.rate(89, "fp4") is None


@pytest.mark.parametrize("card", roofline.CARDS.values(), ids=lambda card: card.name)
def test_rates_agree_with_data_sheets(card):
    """Two independent tables: multiply-adds per clock and scheduler, and TFLOP/s of the data sheet."""
    for operand, tflops in card.tflops.items():
        per_clock = efficiency.rate(10 * card.capability[0] + card.capability[1], operand)
        assert 2 * per_clock * 4 * card.sms * card.clock / 1e3 == pytest.approx(tflops, rel=0.03), operand


def test_gemm_bound():
    """Worked by hand: 4096 x 12288 x 3072 in int8 on a 4090 is 309 GFLOP of 661 T/s, and 6.4 GFLOP of rank 32... in bf16."""
    gemm = roofline.Gemm(4096, 12288, 3072, "s8", weight_bits=4, act_bits=8, rank=32)
    seconds = roofline.gemm_seconds(gemm, roofline.CARDS["RTX 4090"])
    assert seconds == pytest.approx(2 * 4096 * 12288 * 3072 / 661e12 + 2 * 4096 * 12288 * 32 / 165e12)
    few = roofline.Gemm(1, 12288, 3072, "bf16", weight_bits=4, act_bits=16)
    memory = (12288 * 3072 * 4.25 / 8 + 3072 * 2 + 12288 * 2) / 1008e9
    assert roofline.gemm_seconds(few, roofline.CARDS["RTX 4090"]) == pytest.approx(memory)


def test_gemm_bound_without_the_operand():
    with pytest.raises(ValueError, match="H100 has no tensor cores for s4; it has bf16, f16, fp8, s8"):
        roofline.gemm_seconds(roofline.Gemm(64, 64, 64, "s4", 4, 4), roofline.CARDS["H100"])


def test_attention_bound():
    """16384 tokens, 24 heads of 128 on a 4090 in bf16: 13.2 TFLOP of 165 T/s = 80 ms; short heads on a B200 wait for exp."""
    ada = roofline.attention_seconds(1, 24, 16384, 128, "bf16", "bf16", roofline.CARDS["RTX 4090"])
    assert ada == pytest.approx(4 * 24 * 16384**2 * 128 / 165e12)
    b200 = roofline.attention_seconds(1, 24, 16384, 64, "fp8", "fp8", roofline.CARDS["B200"])
    assert b200 == pytest.approx(24 * 16384**2 / (16 * 148 * 1.85e9))


@pytest.mark.parametrize(
    "name, card",
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_card_by_the_name_of_the_driver(name, card):
    found = roofline.card_of(name)
    assert (found and found.name) == card
