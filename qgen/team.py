"""Team: the processes that quantize one model together, over torch.distributed as torchrun or accelerate set it up.

Every process holds the whole model. Of the calls of a replay each takes its share; statistics are merged; of the layers each refines its
share, and all get the packed layers. Messages travel on the CPU, by gloo, whatever the model runs on. No pool of our own: who starts the
processes, and starts them again when one dies, is torchrun (`--max-restarts`), accelerate or the cluster.
"""

__all__ = ["ALONE", "Team", "team_for"]

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

log = logging.getLogger("qgen")
T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """`rank` of `size` processes; alone by default, and then nothing is sent. group: a gloo group over all of them."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share: every `size`-th item."""
        return items[self.rank :: self.size]

    def all(self, value: T) -> list[T]:
        """What every process gives, in the order of their ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def lead(self, make: Callable[[], T]) -> T:
        """`make()` as rank 0 makes it, for all; what it raises there is raised in all."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, 0, group=self.group)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def collect(self, value: T, to: int) -> Iterator[T]:
        """In process `to`: the others' values, one after another, as they are asked for. Elsewhere: nothing, once the value is sent."""
        if self.rank != to:
            dist.send_object_list([value], to, group=self.group)
            return
        for rank in range(self.size):
            if rank != to:
                box: list[Any] = [None]
                dist.recv_object_list(box, rank, group=self.group)
                yield box[0]


ALONE = Team()


@contextlib.contextmanager
def team_for(distributed: "bool | str", job: str) -> Iterator[Team]:
    """The team of this process for one job. ValueError if the processes have different jobs, or there are none where True was asked for.

    distributed: "auto" = all processes of an initialised torch.distributed (accelerate's `PartialState` is one), or of torchrun, for which
    a gloo group is then set up and left; True = the same, and an error where this process is alone; False = alone. job: what is to be done,
    in words that are the same in all processes if they do the same.
    """
    if distributed not in ("auto", True, False):
        raise ValueError(f'distributed is "auto", True or False, found {distributed!r}')
    there = dist.is_available() and distributed is not False
    if there and not dist.is_initialized() and "TORCHELASTIC_RUN_ID" in os.environ and _size() > 1:
        _initialise()
    if not there or not dist.is_initialized() or dist.get_world_size() == 1:
        if distributed is True:
            raise ValueError(
                "distributed=True wants several processes, found this one alone: start the script with torchrun or accelerate launch"
            )
        yield ALONE
        return
    log.info("waiting until all %d processes quantize", dist.get_world_size())
    # A day: others wait while one measures a budget or learns a layer's rounding. That one died shows at once, by its connection.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    team = Team(dist.get_rank(), dist.get_world_size(), group)
    try:
        jobs = team.all(job)
        if len(set(jobs)) > 1:
            other = next(i for i, j in enumerate(jobs) if j != jobs[0])
            raise ValueError(
                f"processes that quantize together must do the same, found {jobs[0]} in rank 0 and {jobs[other]} in rank {other}; "
                "pass distributed=False where each has a model of its own"
            )
        yield team
    finally:
        dist.destroy_process_group(group)


def _initialise() -> None:
    """`dist.init_process_group("gloo")`, with the number of the restart in front of every key.

    torchrun's store outlives the workers that it starts again: without the number they find the addresses of those that died, and are
    refused (torch 2.14).
    """
    store, rank, size = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group("gloo", store=dist.PrefixStore(f"attempt_{attempt}", store), rank=rank, world_size=size)


def _size() -> int:
    word = os.environ.get("WORLD_SIZE", "")
    return int(word) if word.isdigit() else 1
