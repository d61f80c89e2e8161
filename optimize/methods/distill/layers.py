"""Layers: which of a student's learn from which of the teacher's, and how far apart their outputs are."""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn import functional

from optimize.model.errors import BadModel, NoEffect
from optimize.predict.module import call_with
from optimize.source import padding
from optimize.train.fit import Tensors, scaled_error

METHOD = "distill.features"
Pair = tuple[str, str]
"""Names of a module of the student and of one of the teacher."""


class Match:
    """While open, watches the paired layers of both models; each run of these replaces what the last one gave.

    Args:
        student: in evaluation mode; its outputs are projected where they have another width.
        teacher: likewise.
        pairs: from `paired`.
        inputs: one batch, by which the widths are found.
        loss: how two tensors are compared.

    Raises:
        BadModel: two layers do not give tensors that differ in nothing but their width, or a cosine would be taken of
            single numbers.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Sequence[Pair],
        inputs: Tensors,
        loss: Literal["mse", "cosine"],
    ) -> None:
        self._pairs, self._loss = pairs, loss
        self._given = _Watch(student, [pair[0] for pair in pairs])
        self._wanted = _Watch(teacher, [pair[1] for pair in pairs])
        with self, torch.no_grad():
            call_with(student, inputs)
            call_with(teacher, inputs)
            found = list(self._tensors())
        for pair, _, theirs in found:
            if loss == "cosine" and theirs.flatten(1).shape[1:] == (1,):
                raise BadModel(
                    f"{METHOD}: {pair[1]!r} gives one number a sample, so that every cosine is 1 or -1",
                    fix='use loss = "mse", or name other layers',
                )
        self.projections = nn.ModuleList(_projection(mine, theirs, pair) for pair, mine, theirs in found)

    def distance(self, where: torch.Tensor | None = None) -> torch.Tensor:
        """Return the mean distance of all pairs after both models ran, a scalar.

        Args:
            where: from `padding.tokens`; of tensors with a vector for each token only the tokens count.
        """
        parts = [
            distance(project(mine), theirs, self._loss, where)
            for project, (_, mine, theirs) in zip(self.projections, self._tensors(), strict=True)
        ]
        return torch.stack(parts).mean()

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._given.begin()
        self._wanted.begin()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave both models without a trace."""
        self._given.end()
        self._wanted.end()

    def _tensors(self) -> Iterator[tuple[Pair, torch.Tensor, torch.Tensor]]:
        for pair in self._pairs:
            mine, theirs = self._given.tensors.get(pair[0], []), self._wanted.tensors.get(pair[1], [])
            if not mine or len(mine) != len(theirs):
                raise BadModel(
                    f"{METHOD}: {pair[0]!r} of the student gives {len(mine)} floating point tensors, "
                    f"{pair[1]!r} of the teacher {len(theirs)}",
                    fix="name pairs that give the same with layers",
                )
            yield from ((pair, *both) for both in zip(mine, theirs, strict=True))


def distance(mine: torch.Tensor, theirs: torch.Tensor, loss: str, where: torch.Tensor | None = None) -> torch.Tensor:
    """Return how far two tensors of one shape [n, …] are apart, a scalar."""
    if loss == "mse":
        return scaled_error(padding.kept(mine, where), padding.kept(theirs, where))
    mine, theirs = (padding.silenced(each, where).flatten(1) for each in (mine, theirs))
    return 1 - functional.cosine_similarity(mine, theirs).mean()


def paired(layers: Sequence[str], student: nn.Module, teacher: nn.Module) -> list[Pair]:
    """Return the pairs that `layers` asks for; for none, those of one name, or else all of the student's, spread.

    Raises:
        NoEffect: a pair that matches nothing, or nothing to pair.
    """
    if layers:
        return [pair for text in layers for pair in _asked(text, student, teacher)]
    mine, theirs = blocks(student), blocks(teacher)
    same = [name for name in mine if name in theirs]
    return [(name, name) for name in same] or _spread(mine, theirs, "blocks of the models")


def blocks(module: nn.Module) -> list[str]:
    """Return the names of the repeated layers, the members of a ModuleList; where there are none, of every layer.

    Only such as have parameters of their own or below.
    """
    weighty = {name: layer for name, layer in module.named_modules() if name and any(True for _ in layer.parameters())}
    lists = {name for name, layer in module.named_modules() if isinstance(layer, nn.ModuleList)}
    repeated = [name for name in weighty if name.rpartition(".")[0] in lists]
    return repeated or [name for name, layer in weighty.items() if not list(layer.children())]


def _asked(text: str, student: nn.Module, teacher: nn.Module) -> list[Pair]:
    mine, _, theirs = text.partition(":")
    return _spread(_named(mine, student, text, "student"), _named(theirs, teacher, text, "teacher"), repr(text))


def _named(pattern: str, module: nn.Module, text: str, whose: str) -> list[str]:
    names = [name for name, _ in module.named_modules() if name]
    found = fnmatch.filter(names, pattern)
    if not found:
        raise NoEffect(
            f"{METHOD}: layers: {text!r} matches no module of the {whose}",
            fix=f'write "STUDENT:TEACHER", names or globs; the {whose} has {", ".join(names)}',
        )
    return found


def _spread(mine: Sequence[str], theirs: Sequence[str], what: str) -> list[Pair]:
    """Pair each of the student's layers with one of the teacher's, evenly spaced, the last with the last."""
    if not 0 < len(mine) <= len(theirs):
        raise NoEffect(
            f"{METHOD}: layers: {what}: {len(mine)} of the student cannot learn from {len(theirs)} of the teacher",
            fix='name the pairs with layers = ["STUDENT:TEACHER", …]',
        )
    return [(name, theirs[(index + 1) * len(theirs) // len(mine) - 1]) for index, name in enumerate(mine)]


class _Watch:
    """Keeps the floating point tensors that the named modules gave when they were last called."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._modules = {name: module.get_submodule(name) for name in names}
        self._handles: list[Any] = []
        self.tensors: dict[str, list[torch.Tensor]] = {}

    def begin(self) -> None:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._keep(name)))

    def end(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _keep(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, returned: Any) -> None:
            self.tensors[name] = [tensor.float() for tensor in _floating(returned)]

        return hook


def _floating(returned: Any) -> Iterator[torch.Tensor]:
    if isinstance(returned, torch.Tensor):
        if returned.is_floating_point():
            yield returned
        return
    parts: Iterable[Any] = returned.values() if isinstance(returned, Mapping) else returned
    if isinstance(returned, Mapping | tuple | list):
        yield from (tensor for part in parts for tensor in _floating(part))


class _Along(nn.Linear):
    """A linear map of one dim of a tensor."""

    def __init__(self, dim: int, width: int, wanted: int) -> None:
        super().__init__(width, wanted)
        self.dim = dim

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return super().forward(tensor.movedim(self.dim, -1)).movedim(-1, self.dim)


def _projection(mine: torch.Tensor, theirs: torch.Tensor, pair: Pair) -> nn.Module:
    """Return what brings the student's tensor to the width of the teacher's, the one dim in which they differ."""
    if mine.shape == theirs.shape:
        return nn.Identity()
    differing = [dim for dim, sizes in enumerate(zip(mine.shape, theirs.shape, strict=False)) if len(set(sizes)) > 1]
    if mine.ndim != theirs.ndim or len(differing) > 1 or differing == [0]:
        raise BadModel(
            f"{METHOD}: {pair[0]!r} of the student gives {tuple(mine.shape)}, "
            f"{pair[1]!r} of the teacher {tuple(theirs.shape)}",
            fix="name pairs that differ in nothing but their width with layers",
        )
    return _Along(differing[0], mine.shape[differing[0]], theirs.shape[differing[0]])
