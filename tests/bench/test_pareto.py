"""Who is better than whom, against answers worked out by hand."""

from qgen.bench.pareto import Point, front, statements, verdict

MIB = 2**20
OURS = Point("qgen small", True, 4 * MIB, (30.0, 31.0, 32.0), 4)
WIDE = Point("qgen wide", True, 8 * MIB, (40.0, 41.0, 42.0), 16)
GOOD = Point("peer good", False, 5 * MIB, (35.0, 36.0, 37.0), 16)
EVEN = Point("peer even", False, 4 * MIB, (31.0, 29.0, 33.5), 4)  # differences 1, -2, 1.5: no verdict
POOR = Point("peer poor", False, 8 * MIB, (20.0, 20.0, 20.0), 4)


def test_the_front_keeps_what_nobody_beats():
    assert [p.name for p in front([WIDE, POOR, GOOD, OURS])] == ["qgen small", "peer good", "qgen wide"]
    twin = Point("peer twin", False, OURS.nbytes, OURS.psnr)
    assert {p.name for p in front([OURS, twin])} == {"qgen small", "peer twin"}


def test_the_rival_is_the_best_of_the_same_size_or_smaller():
    best, gap = verdict(GOOD, [OURS, WIDE])
    assert best is OURS and gap.mean == 5 and gap.low == 5
    assert verdict(POOR, [OURS, WIDE])[0] is WIDE
    assert verdict(Point("tiny", False, MIB, (1.0,)), [OURS]) is None
    almost = Point("peer", False, int(WIDE.nbytes * 0.995), (50.0, 50.0, 50.0))
    assert verdict(almost, [OURS, WIDE])[0] is WIDE  # half a percent smaller is no advantage


def test_a_better_peer_is_named_with_its_paired_difference():
    lines = statements([OURS, WIDE, GOOD, EVEN, POOR])
    better = (
        "peer good (36.0 dB, 5.00 MiB) is better than every qgen recipe of the same size or smaller: +5.00 dB [+5.00"
    )
    assert better in "\n".join(lines)
    assert not any(line.startswith(("peer even", "peer poor")) for line in lines)
    assert any(line.startswith("qgen wide (41.0 dB, 8.00 MiB) is better than every peer") for line in lines)
    assert not any(line.startswith("qgen small (31") for line in lines)


def test_no_better_peer_is_said_as_well():
    lines = statements([OURS, WIDE, EVEN, POOR])
    assert any(line.startswith("No peer is better than every qgen recipe") for line in lines)


def test_classes_of_inputs_are_compared_apart():
    lines = statements([OURS, WIDE, GOOD, EVEN, POOR])
    four = next(line for line in lines if line.startswith("Inputs of 4 bits"))
    assert "best recipe is qgen small" in four and "best peer peer even" in four
    assert next(line for line in lines if line.startswith("Inputs of 16 bits")).count("peer good") == 1
    assert statements([]) == [] and len(statements([OURS])) == 1
