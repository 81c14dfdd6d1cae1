"""What every tab works with: jobs, models, roots, and a few verbs that tabs share."""

__all__ = ["Desk", "Tab", "identity"]

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from qgen.errors import QgenError
from qgen.web import markup
from qgen.web.child import run_in_child
from qgen.web.errors import told
from qgen.web.jobs import Job, Jobs
from qgen.web.models import Models
from qgen.web.roots import Roots

KEPT = 20  # of a visitor's jobs, those that the browser remembers


@dataclass
class Desk:
    """lists: the fields in which a visitor chooses a pair, filled anew when there is another one; homes: the job ids of their tabs."""

    jobs: Jobs
    models: Models
    roots: Roots
    lists: list = field(default_factory=list)
    homes: list = field(default_factory=list)

    def heavy(self, kind: str, asked: dict[str, Any]) -> Job:
        """A job in a process of its own."""
        return self.jobs.submit("heavy", kind, asked, lambda job: run_in_child(job, list(self.models.worker)))

    async def follow(self, job: Job, shown: Callable[[Job], tuple]) -> AsyncIterator[tuple]:
        """(id, status, *shown(job)) for every change; a failed job ends in its error, as a toast."""
        async for now in self.jobs.watch(job):
            yield (now.id, markup.status(now, self.jobs.ahead(now) if now.state == "waiting" else 0), *shown(now))
        if job.state == "failed":
            raise QgenError(job.error)

    def model_list(self, elem_id: str, job_id: Any) -> Any:
        """A field for a pair. What is not in the list may be typed: the id of a job made elsewhere."""
        import gradio as gr

        found = gr.Dropdown(
            self.models.choices(), value=self.models.choices()[0][1], label="4-bit model", allow_custom_value=True,
            elem_id=elem_id, info="The 16-bit model it was made from is its partner.",
        )  # fmt: skip
        self.lists.append(found)
        self.homes.append(job_id)
        return found

    def cancel_button(self, elem_id: str, job_id: Any) -> Any:
        """Cancels the job of a tab."""
        import gradio as gr

        button = gr.Button("Cancel", elem_id=elem_id, min_width=90, scale=0)
        button.click(
            told(self.cancel),
            job_id,
            None,
            queue=False,
            show_progress="hidden",
            api_name=elem_id,
            api_visibility="private",
        )
        return button

    def cancel(self, job_id: str) -> str:
        """Cancels a job: a waiting one gives up its place, a running one stops at its next step. Returns the state it had then."""
        job = self.jobs.cancel(job_id)
        if job is None:
            raise ValueError("there is no such job to cancel")
        return "cancelled" if job.stop.is_set() else job.state

    def resume(self, shown: Callable[[Job], tuple], outputs: int) -> Callable:
        """A handler for a page that loads again: goes on showing the job that the browser remembers."""
        import gradio as gr

        async def again(job_id: str) -> AsyncIterator[tuple]:
            job = self.jobs.get(job_id)
            if job is None:
                yield tuple(gr.skip() for _ in range(outputs))
                return
            try:
                async for values in self.follow(job, shown):
                    yield values
            except QgenError:  # the status line says it; an old error needs no toast
                return

        return again

    def asked(self, job_id: str, names: tuple[str, ...]) -> list:
        """What was asked of a job, for the fields of its tab; nothing changes where there is no such job."""
        import gradio as gr

        job = self.jobs.get(job_id)
        said = {} if job is None else job.asked.get("typed") or job.asked
        return [gr.skip() if said.get(name) is None else said[name] for name in names]

    def chosen(self, job_id: str) -> str:
        """The pair that the job of a tab was about; "" if there is no such job."""
        job = self.jobs.get(job_id)
        return "" if job is None else str((job.asked.get("typed") or job.asked).get("model") or "")


@dataclass(frozen=True)
class Tab:
    """job_id: the state with the id of a tab's job. ran: its main event. back: (handler, input, outputs) for when a page loads."""

    job_id: Any
    ran: Any
    back: list


def identity(key: str) -> Any:
    """A text that the browser keeps over reloads: the id of a tab's job."""
    import gradio as gr

    return gr.BrowserState("", storage_key=f"qgen-{key}", secret="qgen-web")  # an id is no secret from its own browser
