"""Runs the rows one after the other, each in its own process, and scores their pictures against the 16-bit pipeline's.

A row ends as numbers or as an error in words: what the peer raised, how its process died, or that it took too long. Finished rows stay in
the folder and are not measured again; rows that failed are tried again. A peer may live in another environment: its Python is started
with this qgen at the end of its path, behind whatever is installed there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qgen.bench.job import Job, Row
from qgen.bench.peer import Config, peers
from qgen.bench.peers.unquantized import REFERENCE
from qgen.errors import QgenError
from qgen.eval.scores import Scores

__all__ = ["METRICS", "Bench"]

METRICS = ("psnr", "lpips", "fid", "clip")
# -c and not -m: an environment without qgen finds it where this one does, after its own packages.
_BOOT = (
    "import sys, importlib.util as u; place = sys.argv[1]; u.find_spec('qgen') or sys.path.append(place); "
    "from qgen.bench.worker import main; main(sys.argv[2])"
)


@dataclass
class Bench:
    """Where and how rows are measured.

    folder: keeps finished rows. job: what all rows share (its peer and config are replaced). pythons: {peer: interpreter}.
    timeout: seconds a row may take. extractor: as in `qgen.evaluate`. metrics: of METRICS.
    """

    folder: Path
    job: Job
    pythons: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 1800
    extractor: Any = "auto"
    metrics: Sequence[str] = METRICS

    def rows(
        self, chosen: Sequence[tuple[str, Config]], begin: Callable[[str], None] = lambda name: None
    ) -> Iterator[Row]:
        """Yields a row for each (peer, config), the 16-bit pipeline's first.

        A peer whose package is absent gives one row. begin(name) is called before each row. Raises QgenError if the 16-bit pipeline
        itself fails, ValueError if the folder holds rows that were measured under other settings.
        """
        reference = (REFERENCE[0], peers[REFERENCE[0]]().config(REFERENCE[1]))
        absent: set[str] = set()
        for peer, config in [reference, *(pair for pair in chosen if pair != reference)]:
            if peer in absent:
                continue
            begin(f"{peer} {config.name}")
            if why := self._absent(peer):
                absent.add(peer)
                yield Row(peer, Config("all", 0, 0, ""), why)
                continue
            row = self._row(peer, config)
            if (peer, config) == reference and row.error:
                raise QgenError(f"the 16-bit pipeline itself cannot be drawn with: {row.error}")
            yield row

    def _absent(self, peer: str) -> str:
        if peer in self.pythons:
            return ""  # its own process will tell
        try:
            peers[peer]().version()
        except ModuleNotFoundError as error:
            return f"{error}"
        return ""

    def _row(self, peer: str, config: Config) -> Row:
        where = self.folder / "rows" / f"{peer}-{config.name}"
        job = replace(self.job, peer=peer, config=config.name)
        kept = where / "row.json"
        if kept.is_file():
            data = json.loads(kept.read_text(encoding="utf-8"))
            _same(data["settings"], job.settings(), self.folder)
            row = replace(Row.from_dict(data), config=config)
            if not row.error:
                return row
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir(parents=True)
        (where / "job.json").write_text(job.to_json(), encoding="utf-8")
        found = self._process(peer, where)
        row = Row(peer, config, found.get("error", ""), found.get("measured", {}))
        if not row.error:
            row = replace(row, scores=self._score(where, job))
        data = {"settings": job.settings(), **row.to_dict()}
        stage = where / ".row.json"
        stage.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(stage, kept)
        return row

    def _process(self, peer: str, where: Path) -> dict[str, Any]:
        """result.json of a worker, or {"error": how it ended without one}."""
        import qgen

        home = str(Path(qgen.__file__).resolve().parent.parent)
        command = [self.pythons.get(peer, sys.executable), "-c", _BOOT, home, str(where.resolve())]
        log = where / "log.txt"
        with open(log, "wb") as out:
            try:
                child = subprocess.Popen(
                    command, stdout=out, stderr=out, cwd=where, start_new_session=os.name == "posix"
                )
            except OSError as error:
                return {"error": f"{command[0]} cannot be started: {error.strerror or error}"}
            try:
                code = child.wait(self.timeout)
            except subprocess.TimeoutExpired:
                return {"error": f"no result after {self.timeout:g} s, stopped; --timeout allows more"}
            finally:
                _end(child)
        if (where / "result.json").is_file():
            return dict(json.loads((where / "result.json").read_text(encoding="utf-8")))
        lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        return {"error": f"its process died ({_ending(code)}); last words: {lines[-1][-200:] if lines else 'none'}"}

    def _score(self, where: Path, job: Job) -> Scores:
        from qgen.eval.evaluate import evaluate

        return evaluate(
            where / "pictures", self.folder / "rows" / "-".join(REFERENCE) / "pictures", list(job.prompts), metrics=self.metrics,
            extractor=self.extractor, seed=job.seed, batch_size=job.batch_size, progress=False,
        )  # fmt: skip


def _same(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    differ = [k for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k)]
    if differ:
        said = ", ".join(k if k == "prompts" else f"{k} {found.get(k)!r} (now {wanted.get(k)!r})" for k in differ)
        raise ValueError(
            f"{folder} holds rows measured with other settings: {said}; add --fresh to measure all again, or name another --out"
        )


def _end(child: subprocess.Popen) -> None:
    """Ends a worker and whatever it started."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    elif child.poll() is None:
        child.kill()
    child.wait()


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
