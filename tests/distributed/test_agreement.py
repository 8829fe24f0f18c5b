"""Work that fails on every rank if it fails on one, and decisions that must agree."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.process_group import ProcessGroup
from torchrec_fmp.distributed.agreement import (
    PeerError,
    all_or_none,
    broadcast_text,
    check_equal,
    largest,
    watched,
)

SOON = timedelta(seconds=1)
NOTHING = "nothing was raised"


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def raised(
    work: Callable[[Callable[[], None]], Any],
    group: dist.ProcessGroup | None = None,
    timeout: timedelta = timedelta(seconds=60),
) -> str:
    """Name and message of the error that the agreement raises."""
    try:
        with all_or_none("counting", group or world(), timeout) as check:
            work(check)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return NOTHING


def fail_on(*ranks: int) -> Callable[[Callable[[], None]], None]:
    def work(_: Callable[[], None]) -> None:
        if dist.get_rank() in ranks:
            raise KeyError(f"no seven on rank {dist.get_rank()}")

    return work


def wait_for_a_failure(check: Callable[[], None]) -> None:
    """Long work that calls `check` regularly."""
    pause = threading.Event()
    while True:
        check()
        pause.wait(0.01)


def failing(ranks: list[int]) -> str:
    return raised(fail_on(*ranks))


OF_RANK_1 = "RuntimeError: counting failed on rank 1: KeyError('no seven on rank 1')"


def test_work_that_succeeds_everywhere_raises_nothing(ranks: ProcessGroup) -> None:
    assert set(ranks.run(failing, [])) == {NOTHING}


def test_the_failing_rank_raises_its_own_error_and_the_others_name_rank_and_error(
    ranks_4: ProcessGroup,
) -> None:
    others, own = OF_RANK_1, "KeyError: 'no seven on rank 1'"
    assert ranks_4.run(failing, [1]) == [others, own, others, others]


def test_each_rank_raises_its_own_error_when_all_fail(ranks_2: ProcessGroup) -> None:
    errors = ranks_2.run(failing, [0, 1])
    assert errors == [f"KeyError: 'no seven on rank {rank}'" for rank in (0, 1)]


def late_but_attentive() -> str:
    if dist.get_rank() == 1:
        return raised(wait_for_a_failure)
    return raised(lambda _: None, timeout=SOON)


def late_and_deaf() -> str:
    if dist.get_rank() == 0:
        error = raised(lambda _: None, timeout=SOON)
        world().get_group_store().set("rank 0 gave up", "yes")
        return error
    error = raised(lambda _: world().get_group_store().get("rank 0 gave up"))
    world().get_group_store().delete_key("rank 0 gave up")
    return error


@pytest.mark.parametrize("late", [late_but_attentive, late_and_deaf])
def test_a_rank_that_does_not_finish_in_time_fails_every_rank(
    ranks_2: ProcessGroup, late: Callable[[], str]
) -> None:
    in_time, too_late = ranks_2.run(late)
    verdict = "counting failed: 1 of 2 ranks did not finish in 0:00:01"
    assert in_time == f"RuntimeError: {verdict}"
    assert too_late == f"RuntimeError: counting failed on rank 0: {verdict}"


def one_works_long() -> str:
    return raised(fail_on(1) if dist.get_rank() == 1 else wait_for_a_failure)


def test_long_work_learns_of_a_failure_when_it_checks(ranks_2: ProcessGroup) -> None:
    assert ranks_2.run(one_works_long)[0] == OF_RANK_1


def several() -> list[str]:
    return [raised(fail_on(*ranks)) for ranks in ([], [1], [], [0], [0, 1], [])]


def test_consecutive_agreements_do_not_mix(ranks_2: ProcessGroup) -> None:
    first, second = ranks_2.run(several)
    assert [error == NOTHING for error in first] == [True, False, True, False, False, True]
    assert [error == NOTHING for error in second] == [True, False, True, False, False, True]
    assert first[1] == OF_RANK_1
    assert "failed on rank 0" in second[3]


def nested(inner: list[int], outer: list[int]) -> list[str]:
    """Errors of an agreement that contains another, and of the agreement after it."""

    def work(check: Callable[[], None]) -> None:
        with all_or_none("adding", world()):
            fail_on(*inner)(check)
        fail_on(*outer)(check)

    return [raised(work), raised(fail_on())]


def test_nested_agreements_report_the_failing_rank(ranks_2: ProcessGroup) -> None:
    assert ranks_2.run(nested, [], []) == [[NOTHING, NOTHING]] * 2
    inner = "adding failed on rank 1: KeyError('no seven on rank 1')"
    assert ranks_2.run(nested, [1], []) == [
        [f"RuntimeError: {inner}", NOTHING],
        ["KeyError: 'no seven on rank 1'", NOTHING],
    ]
    assert ranks_2.run(nested, [], [1])[0] == [OF_RANK_1, NOTHING]


def in_part_of_the_ranks() -> list[str]:
    """Errors in two concurrent groups of two; rank 3, the second of its group, fails."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return [raised(fail_on(3), groups[dist.get_rank() % 2])]


def test_subgroups_of_ranks_agree_independently(ranks_4: ProcessGroup) -> None:
    (even,), (odd,), (other_even,), (failed,) = ranks_4.run(in_part_of_the_ranks)
    assert even == other_even == NOTHING
    assert odd == "RuntimeError: counting failed on rank 1: KeyError('no seven on rank 3')"
    assert failed == "KeyError: 'no seven on rank 3'"


def lost(rank_1_explains: bool) -> tuple[str, str]:
    """Error of rank 0, and its cause, when rank 0 loses rank 1."""

    def work(check: Callable[[], None]) -> None:
        if dist.get_rank() == 1:
            raise KeyError("the reason")
        try:
            wait_for_a_failure(check)
        except RuntimeError:
            raise PeerError("rank 1 is gone") from None

    def unexplained(check: Callable[[], None]) -> None:
        if dist.get_rank() == 1:
            wait_for_a_failure(check)
        raise PeerError("rank 1 is gone")

    try:
        with all_or_none("counting", world()) as check:
            (work if rank_1_explains else unexplained)(check)
    except Exception as error:
        return f"{type(error).__name__}: {error}", repr(error.__cause__)
    return NOTHING, ""


def test_the_error_of_a_lost_rank_is_preferred_to_its_loss(ranks_2: ProcessGroup) -> None:
    error, cause = ranks_2.run(lost, True)[0]
    assert error == "RuntimeError: counting failed on rank 1: KeyError('the reason')"
    assert cause == "PeerError('rank 1 is gone')"


def test_an_unexplained_loss_of_a_rank_is_the_error(ranks_2: ProcessGroup) -> None:
    (own, _), (other, _) = ranks_2.run(lost, False)
    assert own == "PeerError: rank 1 is gone"
    assert other == "RuntimeError: counting failed on rank 0: PeerError('rank 1 is gone')"


def watching() -> tuple[str, bool, bool]:
    """Error of rank 0 whose work waits forever, whether it had ended, and whether it is stopped."""
    release, ended = threading.Event(), threading.Event()
    stopped: list[str] = []

    def stuck(proceed: Callable[[], None]) -> None:
        proceed()
        release.wait()
        try:
            proceed()
        except PeerError as error:
            stopped.append(str(error))
        ended.set()

    def work(check: Callable[[], None]) -> None:
        if dist.get_rank() == 1:
            raise KeyError("no seven on rank 1")
        watched(stuck, check)

    error = raised(work)
    had_ended = ended.is_set()
    release.set()
    if dist.get_rank() == 0:
        assert ended.wait(10)
    return error, had_ended, bool(stopped)


def test_work_that_waits_forever_is_abandoned_when_another_rank_fails(
    ranks_2: ProcessGroup,
) -> None:
    assert ranks_2.run(watching)[0] == (OF_RANK_1, False, True)


def test_watched_waits_for_its_work_and_raises_its_error() -> None:
    done: list[int] = []

    def work(_: Callable[[], None]) -> str:
        done.append(threading.get_ident())
        return "seven"

    assert watched(work, lambda: None) == "seven"
    assert len(done) == 1 and done[0] != threading.get_ident()

    def fail(_: Callable[[], None]) -> None:
        raise KeyError("seven")

    with pytest.raises(KeyError, match="seven"):
        watched(fail, lambda: None)


def digests(of_rank: list[str]) -> str:
    try:
        check_equal(of_rank[dist.get_rank()], "the cut", world())
    except RuntimeError as error:
        return str(error)
    return NOTHING


def test_a_digest_that_differs_is_refused_on_every_rank_and_names_the_ranks(
    ranks_4: ProcessGroup,
) -> None:
    assert set(ranks_4.run(digests, ["a", "a", "a", "a"])) == {NOTHING}
    for error in ranks_4.run(digests, ["a", "b", "a", "c"]):
        assert "the cut differs between ranks: ranks [1, 3] disagree with rank 0" in error


def decided(values: list[float], text: str) -> tuple[float, str]:
    rank, device = dist.get_rank(), torch.device("cpu")
    said = broadcast_text(text if rank == 0 else None, world(), device)
    return largest(values[rank], world(), device), said


@pytest.mark.parametrize("text", ["", "ein Wort: über", "x" * 10_000])
def test_every_rank_gets_the_text_of_rank_0_and_the_largest_value(
    ranks_2: ProcessGroup, text: str
) -> None:
    # An empty text is sent as a space, so trailing white space is ignored.
    assert [(value, said.rstrip()) for value, said in ranks_2.run(decided, [-2.0, -1.0], text)] == [
        (-1.0, text)
    ] * 2


def test_the_largest_value_is_nan_if_any_value_is_nan(ranks_2: ProcessGroup) -> None:
    for value, _ in ranks_2.run(decided, [float("nan"), 1.0], "a"):
        assert value != value
