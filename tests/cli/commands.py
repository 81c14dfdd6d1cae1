"""Running the command line inside a test."""

from typer.testing import CliRunner

from qgen.cli import app


def run(*args, code=0):
    """The result of a command that must end with this exit code."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def refused(*args):
    """The one line on stderr of a command that must fail with exit code 2."""
    result = run(*args, code=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output
    return lines[0]
