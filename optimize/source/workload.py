"""Workload: what the user brings."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from modelathe.tensors import Array, Arrays, Dim, TensorSpec
from optimize.model.errors import BadData, BadWorkload
from optimize.source.batch import Batch, Batches, guarded, mean

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Workload:
    """A trained model with its data and its metric.

    Args:
        name: names the model in the repository: letters, digits, `_` and `-`.
        model: the trained module, or a function that builds it and loads its weights. It is called with the inputs by
            name, or in their order where its arguments have other names, and returns a tensor (one output), or a tuple
            or mapping with one tensor for each name in `outputs`.
        inputs: one TensorSpec for each argument of the model's forward; the first dim of each is the batch axis.
        outputs: names of the outputs, in the model's order.
        evaluation: a function that returns the evaluation batches, the same ones in the same order at every call.
        scores: called as `scores(outputs, targets, reference)` over the whole evaluation set in order; `outputs` and
            `reference` (the trained model's outputs) are mappings of arrays, `targets` is concatenated likewise.
            Returns one float for each judged sample under each score's name; the first score is the gated metric.
        calibration: a function that returns batches for the ranges of static quantization, never evaluation samples.
        training: a function that returns training batches; one call is one epoch.
        selection: a function that returns batches like evaluation's, of other samples, on which a search inside a step
            may judge; without it, such a search takes training samples, or calibration's where these have targets.
        students: functions that build further, smaller modules with the same inputs and outputs, by name, for
            distillation; their weights are whatever the function gives them.
        loss: `loss(outputs, targets)` on torch tensors, returns a scalar; needed where a step trains with labels.
        mask: `mask(inputs)` returns for the input arrays of a batch which positions hold tokens, [n, length], 0 where
            there is padding, which then counts in no calibration, score or distillation loss. Without one, an input
            named `attention_mask` says it. Inputs come batch first, and so does what layers make of them. In
            calibration, padding is cut off where the length is a free Dim.
        bounded: whether the figures lie in [0, 1]: that of the first score, and of those that `higher_is_better` does
            not name; of these, more is better. A budget may then say `keep = 0.99`.
        higher_is_better: whether more of a score is better, by its name; False for a loss, an error or a perplexity.
            Every score must be named where the workload is not bounded.
        aggregate: turns an array of per-sample scores into the figure; the mean unless it says otherwise.
        inferred: what `Workload.of` read from the data, in words.
    """

    name: str
    model: "nn.Module | Callable[[], nn.Module]"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    evaluation: Batches
    scores: Callable[[Arrays, Any, Arrays], Mapping[str, Array]]
    calibration: Batches | None = None
    training: Batches | None = None
    selection: Batches | None = None
    loss: "Callable[[Mapping[str, torch.Tensor], Any], torch.Tensor] | None" = None
    students: "Mapping[str, Callable[[], nn.Module]]" = field(default_factory=dict)
    mask: Callable[[Arrays], Array] | None = None
    bounded: bool = False
    aggregate: Callable[[Array], float] = mean
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    inferred: tuple[str, ...] = field(default=(), compare=False)
    source: str = field(default="", compare=False)

    @classmethod
    def of(
        cls, model: "nn.Module | Callable[[], nn.Module]", evaluation: Any, metric: Any, **fields: Any
    ) -> "Workload":
        """Return the workload of a module, its data and a metric; what is not said is read from the first batches.

        Args:
            model: the trained module, or a function that returns it.
            evaluation: a torch DataLoader that does not shuffle, a list of batches, a function that returns one, or a
                tuple of whole arrays. A batch is `(x, y)`, `(x1, x2, y)`, `({"x": x}, y)` or a mapping; inputs go by
                the names of forward's arguments, whatever else is there are targets.
            metric: accuracy, f1, iou, auroc, mse, rmse, mae, perplexity or word_error_rate; a torchmetrics metric; or a
                function of the first output and the targets that returns one number for each sample.
            fields: of the long form: `training`, `calibration` and `selection` as `evaluation`; `loss` also by name:
                cross_entropy, bce, mse or l1; `higher_is_better` also as one bool; `name`, `inputs`, `outputs` and the
                rest as they are.

        Raises:
            BadWorkload: the module's arguments or answer have no names, or the metric does not fit its outputs.
            BadData: a loader can be read but once, or gives other parts than forward takes.
        """
        from optimize.source import short

        own = {"model", "evaluation", "scores", "inferred", "source"}
        known = {entry.name for entry in dataclasses.fields(cls)} - own
        if unknown := sorted(set(fields) - known):
            raise BadWorkload(f"a workload has no {unknown[0]!r}", fix=f"it takes {', '.join(sorted(known))}")
        return cls(model=model, **short.read(model, evaluation, metric, fields))

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", self.name):
            raise BadWorkload(
                f"the name {self.name!r} cannot name a model", fix="use up to 100 of A-Z, a-z, 0-9, '_' and '-'"
            )
        if isinstance(self.outputs, str):
            raise BadWorkload(
                f"outputs is the text {self.outputs!r}, not a tuple", where=self.name, fix=f"write ({self.outputs!r},)"
            )
        for what, names in (("inputs", [spec.name for spec in self.inputs]), ("outputs", list(self.outputs))):
            if not names or len(set(names)) < len(names) or not all(names):
                raise BadWorkload(
                    f"{what} needs one distinct name for each tensor, got {names}",
                    where=self.name,
                    fix=f"name every tensor of the model in the workload's {what}",
                )
        if not isinstance(self.higher_is_better, Mapping) or set(map(type, self.higher_is_better.values())) - {bool}:
            raise BadWorkload(
                f"higher_is_better is {self.higher_is_better!r}",
                where=self.name,
                fix='give True or False for each score by name, as in {"accuracy": True, "perplexity": False}',
            )
        for spec in self.inputs:
            if not spec.batched:
                raise BadWorkload(
                    f"input {spec.name!r} has no batch axis",
                    where=self.name,
                    fix="start its dims with modelathe.tensors.BATCH",
                )

    def batches(self, kind: str) -> Iterator[Batch]:
        """Yield the batches of `kind`, a name in `batch.DATA`, each checked against the TensorSpecs."""
        source: Batches | None = getattr(self, kind)
        if source is None:
            raise BadWorkload(
                f"the workload has no {kind} data", where=self.name, fix=f"give Workload a {kind} function"
            )
        count = 0
        iterator = guarded(lambda: iter(source()), f"{kind}()", self.source)
        while (batch := guarded(lambda: next(iterator, None), f"{kind}()", self.source)) is not None:
            _check_batch(batch, self.inputs, f"{self.name}: {kind} batch {count}")
            # In one order, which is that of forward's arguments where these have other names.
            yield Batch({spec.name: batch.inputs[spec.name] for spec in self.inputs}, batch.targets)
            count += 1
        if not count:
            raise BadData(f"{kind}() returned no batch", where=self.name, fix="let it return its batches at every call")

    def first(self) -> Arrays:
        """Return the inputs of the first evaluation batch."""
        return next(self.batches("evaluation")).inputs

    def build(self, student: str = "") -> "nn.Module":
        """Return the trained model, or the named student, in evaluation mode: a copy that may be changed.

        Raises:
            BadWorkload: no such student, the user's code raised or returned something else than a module, or one whose
                state no step can hold, such as parameters of 16 bits.
            BadModel: the module cannot be copied.
        """
        from torch import nn

        from optimize.model import copies, state

        if student and student not in self.students:
            raise BadWorkload(
                f"there is no student {student!r}",
                where=self.source or self.name,
                fix=f"students of this workload: {', '.join(self.students) or 'none; give Workload(students={…})'}",
            )
        given = self.students[student] if student else self.model
        what = f"students[{student!r}]()" if student else "model()"
        model = given if isinstance(given, nn.Module) else guarded(given, what, self.source)
        if not isinstance(model, nn.Module):
            raise BadWorkload(
                f"{what.removesuffix('()')} is {type(model).__name__}, not a torch.nn.Module",
                where=self.name,
                fix="give the trained module, or a function that returns it",
            )
        model = copies.unwrapped(model)
        state.check(model, what.removesuffix("()"), self.source or self.name)
        # The user's function may return one and the same module at every call.
        copy = copies.copied(model)
        state.separate(copy)
        guarded(copy.eval, "eval()", self.source)
        return copy


def _check_batch(batch: object, specs: tuple[TensorSpec, ...], where: str) -> None:
    if not isinstance(batch, Batch):
        raise BadData(f"is {type(batch).__name__}, not a Batch", where=where, fix="yield Batch(inputs, targets)")
    if not isinstance(batch.inputs, Mapping) or not all(isinstance(a, np.ndarray) for a in batch.inputs.values()):
        raise BadData("its inputs are not a mapping of numpy arrays", where=where, fix="yield Batch({name: array}, …)")
    names = {spec.name for spec in specs}
    fix = "let the data and the workload's TensorSpecs say the same"
    if set(batch.inputs) != names:
        found = sorted(map(str, batch.inputs))
        raise BadData(f"has the inputs {found}, the workload declares {sorted(names)}", where=where, fix=fix)
    if len({array.shape[:1] for array in batch.inputs.values()}) != 1:
        raise BadData("its inputs differ in batch size", where=where, fix="give every input one row for each sample")
    for spec in specs:
        _check_array(batch.inputs[spec.name], spec, where, fix)


def _check_array(array: Array, spec: TensorSpec, where: str, fix: str) -> None:
    if str(array.dtype) != spec.dtype:
        what = f"input {spec.name!r} is {array.dtype}, the workload declares {spec.dtype}"
        raise BadData(what, where=where, fix=fix)
    wrong = len(array.shape) != len(spec.dims) or any(
        not dim.minimum <= size <= dim.maximum if isinstance(dim, Dim) else dim != size
        for size, dim in list(zip(array.shape, spec.dims, strict=False))[1:]
    )
    if wrong:
        wanted = ", ".join(f"{d.name} {d.minimum}..{d.maximum}" if isinstance(d, Dim) else str(d) for d in spec.dims)
        what = f"input {spec.name!r} has the shape {array.shape}, the workload declares ({wanted})"
        raise BadData(what, where=where, fix=fix)
    if not len(array):
        raise BadData(f"input {spec.name!r} has no samples", where=where, fix="leave empty batches out")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        sample = int(np.argwhere(~np.isfinite(array))[0][0])
        raise BadData(
            f"input {spec.name!r} has a NaN or infinite value in sample {sample}",
            where=where,
            fix="clean the data, or drop that sample",
        )


def fewest(inputs: Sequence[TensorSpec]) -> int:
    """Return the fewest samples that a model with these inputs takes in one call."""
    return max((spec.shape(size="minimum")[0] for spec in inputs if spec.batched), default=1)
