"""A run with a store: the same trajectory, nothing computed twice, and the same bits however often it is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import IdPair, random_pairs, tiny_model, with_lora
from training.runs import CPU, adapter_weights, make_training

from qlora_dpo.data.packing import PackedBatch, pack
from qlora_dpo.errors import ModelError, StorageError
from qlora_dpo.models.scoring import choose_scorer
from qlora_dpo.reference.local import ReferenceLogps, Score, logps_by_completion, reference_score
from qlora_dpo.reference.store import ModelIdentity, ModelRows, ReferenceStore, completion_key
from qlora_dpo.reference.stored import StoredReference
from qlora_dpo.training.folder.checkpoints import checkpoints
from qlora_dpo.training.loop import Training, fit
from qlora_dpo.training.records.tracking import read_metrics

MODEL = ModelIdentity("a" * 64, {"model": "tiny"})
TIMES = {"step_seconds", "pairs_per_second", "tokens_per_second", "memory/peak_gib"}


def pairs() -> list[IdPair]:
    """Twelve pairs; among them two of one prompt that share the chosen answer, and one pair twice."""
    generator = torch.Generator().manual_seed(5)
    made = random_pairs([tuple(row) for row in torch.randint(2, 14, (10, 3), generator=generator).tolist()])
    return [*made, IdPair(made[1].prompt_ids, made[1].chosen_ids, [9, 8, 7]), made[2]]


class Counted:
    """Counts the micro-batches that a score is asked for, and lets its values depend on them, as rounding does on
    larger machines."""

    def __init__(self, score: Score, by_cut: float = 0.0) -> None:
        self._score, self._by_cut = score, by_cut
        self.calls = 0

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        self.calls += 1
        return self._score(batch) + self._by_cut * batch.input_ids.numel()


def stored_training(
    folder: Path, store: ReferenceStore | None, *, by_cut: float = 0.0, **options: Any
) -> tuple[Training, Counted]:
    """A run of two and a half epochs with its reference in `store`, or in memory."""
    model = with_lora(tiny_model(), zero=True)
    settings = {"steps": 10, "pairs_per_step": 3, "max_tokens": 45, "eval_steps": 2, "save_steps": 3} | options
    training = make_training(model, pairs(), folder, **settings)
    training.schedule = type(training.schedule)(range(12), 3, settings["steps"], training.options.seed)
    training.eval_indices = [4, 11, 1]
    score = Counted(reference_score(model, training.engine.scorer), by_cut)
    rows = None if store is None else store.of(MODEL)
    training.engine.reference = ReferenceLogps(score) if rows is None else StoredReference(score, pairs(), rows)
    return training, score


def outcome(training: Training) -> tuple[list[dict[str, float]], list[bytes]]:
    rows = [
        {name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(training.run.metrics)
    ]
    return rows, [weight.numpy().tobytes() for weight in adapter_weights(training.engine.model)]


def losses(training: Training) -> list[float]:
    return [row["loss"] for row in read_metrics(training.run.metrics)]


@pytest.mark.slow
def test_second_run_and_second_epoch_compute_nothing(tmp_path: Path) -> None:
    inline, _ = stored_training(tmp_path / "inline", None)
    fit(inline)
    with ReferenceStore.open(tmp_path / "store.sqlite") as store:
        first, score = stored_training(tmp_path / "first", store)
        asked: list[int] = []
        check = first.stop.check
        first.stop.check = lambda: (asked.append(score.calls), check())[1]  # type: ignore[func-returns-value,method-assign]
        fit(first)
        assert score.calls == asked[len(asked) // 2] > 0  # all in the first epoch
        # The pair that is there twice is computed once.
        assert first.engine.reference.summary().startswith("reference: 11 pairs computed, 1 from the store ")
        assert losses(first) == pytest.approx(losses(inline), abs=1e-5)

        options = {"learning_rate": 3e-2, "seed": 7, "max_tokens": 90}
        second, score = stored_training(tmp_path / "second", store, **options)
        fit(second)
        other, _ = stored_training(tmp_path / "other", None, **options)
        fit(other)
        assert score.calls == 0
        assert second.engine.reference.summary().startswith("reference: 0 pairs computed, 12 from the store ")
        assert losses(second) == pytest.approx(losses(other), abs=1e-5)
        for ours, expected in zip(
            adapter_weights(second.engine.model), adapter_weights(other.engine.model), strict=True
        ):
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def killed_and_continued(folder: Path, at: list[int], *, with_store: bool) -> Training:
    """A run that is killed at these micro-batches, each counted from its last start, and then ends; its log-probs
    depend on the cut."""
    for kill in [*at, None]:
        store = ReferenceStore.open(folder / "store.sqlite") if with_store else None
        training, _ = stored_training(folder / "run", store, by_cut=1e-5)
        polls = iter(range(10_000))

        def check(polls: Any = polls, kill: int | None = kill) -> None:
            if next(polls) == kill:
                raise Killed

        training.stop.check = check  # type: ignore[method-assign]
        try:
            fit(training)
        except Killed:
            assert kill is not None
        else:
            assert kill is None
        training.recorder.finish()
        if store is not None:
            store.close()
    return training


@pytest.mark.slow
@pytest.mark.parametrize("at", [[3], [9], [14], [17], [25], [6, 2, 9], [8, 8]])
def test_killed_run_ends_with_the_bits_of_an_unbroken_one(at: list[int], tmp_path: Path) -> None:
    unbroken = killed_and_continued(tmp_path / "unbroken", [], with_store=True)
    broken = killed_and_continued(tmp_path / "broken", at, with_store=True)
    assert outcome(broken) == outcome(unbroken)
    assert len(checkpoints(tmp_path / "broken" / "run")) == 2


@pytest.mark.slow
def test_without_a_store_the_bits_would_differ(tmp_path: Path) -> None:
    unbroken, broken = (killed_and_continued(tmp_path / str(len(at)), at, with_store=False) for at in ([], [17]))
    assert outcome(broken) != outcome(unbroken)
    assert losses(broken) == pytest.approx(losses(unbroken), abs=1e-3)


# One reference


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with ReferenceStore.open(tmp_path / "store.sqlite") as opened:
        yield opened


def score_of_tiny() -> tuple[Counted, Any]:
    model = with_lora(tiny_model())
    scorer = choose_scorer(model, pairs()[0], CPU)
    return Counted(reference_score(model, scorer), by_cut=1e-5), scorer


def asked(reference: Any, places: list[int]) -> np.ndarray:
    return reference(places, pack([pairs()[place] for place in places], "shared")).numpy()


def test_values_are_those_of_the_micro_batch_that_came_first(store: ReferenceStore) -> None:
    score, _ = score_of_tiny()
    reference = StoredReference(score, pairs(), store.of(MODEL))
    first = asked(reference, [1, 3])
    alone = asked(reference, [1])
    assert alone.tobytes() == first[: len(alone)].tobytes() and score.calls == 1
    shared = len(pairs()[1].chosen_ids)
    again = asked(reference, [10, 1])  # its chosen answer is known, the rejected one is not
    assert score.calls == 2 and again[:shared].tobytes() == alone[:shared].tobytes()
    assert again[-len(alone) :].tobytes() == alone.tobytes()
    assert reference.unknown([0, 1, 10, 11]) == [0, 11] and list(reference.known(range(12))) == [1, 3, 10]
    assert reference.summary().startswith("reference: 3 pairs computed, 0 from")
    later = StoredReference(score, pairs(), store.of(MODEL))
    assert asked(later, [10, 1]).tobytes() == again.tobytes()
    assert later.summary().startswith("reference: 0 pairs computed, 2 from")


def test_pair_that_comes_twice_is_one_row(store: ReferenceStore) -> None:
    score, _ = score_of_tiny()
    reference = StoredReference(score, pairs(), store.of(MODEL))
    both = asked(reference, [2, 11])
    half = len(both) // 2
    assert both[:half].tobytes() == both[half:].tobytes() and len(store.of(MODEL)) == 2


def test_forgotten_pairs_are_scored_anew_and_the_store_has_the_new_values(store: ReferenceStore) -> None:
    score, _ = score_of_tiny()
    reference = StoredReference(score, pairs(), store.of(MODEL))
    asked(reference, [5, 6])
    reference.forget([5, 6])
    assert reference.unknown([5, 6]) == [5, 6] and reference.summary().startswith("reference: 0 pairs computed, 0")
    alone = asked(reference, [5])
    assert alone.tobytes() == asked(ReferenceLogps(score), [5]).tobytes()
    assert asked(StoredReference(score, pairs(), store.of(MODEL)), [5]).tobytes() == alone.tobytes()


def test_blank_reference_computes_and_leaves_the_store_alone(store: ReferenceStore) -> None:
    score, _ = score_of_tiny()
    reference = StoredReference(score, pairs(), store.of(MODEL))
    asked(reference, [1])
    asked(reference.blank(), [1, 2])
    assert score.calls == 2 and list(reference.known(range(12))) == [1]


def test_damaged_row_is_computed_again(store: ReferenceStore) -> None:
    score, _ = score_of_tiny()
    expected = asked(StoredReference(score, pairs(), store.of(MODEL)), [1])
    with store.writing() as connection:
        connection.execute("UPDATE logps SET value = zeroblob(length(value))")
    assert asked(StoredReference(score, pairs(), store.of(MODEL)), [1]).tobytes() == expected.tobytes()
    assert store.problems() == [] and score.calls == 2


def test_another_models_rows_are_never_added_to(store: ReferenceStore) -> None:
    score, _ = score_of_tiny()
    asked(StoredReference(score, pairs(), store.of(MODEL)), [1])
    reference = StoredReference(score, pairs(), store.of(MODEL), may_compute=False)
    asked(reference, [1])
    with pytest.raises(ModelError, match="lost rows of 1 pairs"):
        asked(reference, [1, 2])
    assert score.calls == 1


def test_numbers_that_are_none_reach_the_loop_and_not_the_store(store: ReferenceStore) -> None:
    score, _ = score_of_tiny()
    broken = StoredReference(lambda batch: score(batch) * np.nan, pairs(), store.of(MODEL))
    for _ in range(2):
        assert np.isnan(asked(broken, [1])).all()
    broken.close()
    assert len(store.of(MODEL)) == 0 and score.calls == 1


def test_run_outlives_a_store_that_takes_nothing_for_a_while(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score, _ = score_of_tiny()
    reference, now = StoredReference(score, pairs(), store.of(MODEL)), 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    put = ModelRows.put

    def full(*_: Any) -> None:
        raise StorageError("the disk is full.")

    monkeypatch.setattr(ModelRows, "put", full)
    expected = [asked(reference, [place]) for place in (0, 1)]
    assert [asked(reference, [place]).tobytes() for place in (0, 1)] == [values.tobytes() for values in expected]
    assert score.calls == 2 and reference.unknown([0, 1, 2]) == [2]
    monkeypatch.setattr(ModelRows, "put", put)
    asked(reference, [2])
    assert len(store.of(MODEL)) == 0  # not yet tried again
    assert reference.summary().endswith("; 6 rows could not be written")
    now += 61
    asked(reference, [3])
    assert list(reference.known(range(11))) == [0, 1, 2, 3]
    error = capsys.readouterr().err
    assert error.count("warning:") == 1 and "the disk is full. The run goes on with the reference in memory" in error
    assert reference.summary().endswith("store.sqlite")


def test_what_the_store_did_not_take_is_tried_once_more_at_the_end(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, _ = score_of_tiny()
    reference = StoredReference(score, pairs(), store.of(MODEL))
    with monkeypatch.context() as patched:
        patched.setattr(ModelRows, "put", lambda *_: (_ for _ in ()).throw(StorageError("full.")))
        asked(reference, [0])
    reference.close()
    assert list(reference.known(range(12))) == [0]


def test_run_outlives_a_store_that_cannot_be_read(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score, _ = score_of_tiny()
    expected = asked(StoredReference(score, pairs(), store.of(MODEL)), [1])
    reference = StoredReference(score, pairs(), store.of(MODEL))

    def lost(*_: Any) -> None:
        raise StorageError("disk I/O error.")

    monkeypatch.setattr(ModelRows, "get", lost)
    monkeypatch.setattr(ModelRows, "has", lost)
    for _ in range(2):
        assert asked(reference, [1]).tobytes() == expected.tobytes()
    reference.forget([1])
    reference.close()
    assert score.calls == 2 and capsys.readouterr().err.count("warning: disk I/O error.") == 1
    assert list(StoredReference(score, pairs(), store.of(MODEL)).known([1])) == []


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("kind", ["shared", "padded"])
def test_log_probs_by_completion_are_in_order(kind: Any, max_tokens: int) -> None:
    model = with_lora(tiny_model())
    score = reference_score(model, choose_scorer(model, pairs()[0], CPU))
    found = logps_by_completion(score, pairs(), kind=kind, device=CPU, max_tokens=max_tokens)
    for place, pair in enumerate(pairs()):
        expected = score(pack([pair], "padded")).numpy()
        assert np.concatenate(found[2 * place : 2 * place + 2]) == pytest.approx(expected, abs=1e-5)
    assert len(completion_key(pairs()[0].prompt_ids, pairs()[0].chosen_ids)) == 16
