"""Our criteria in Torch-Pruning's pruners, and Torch-Pruning's importances in our `Pruner`.

docs/torch_pruning.md shows both. Nothing else in the package imports this module.
"""

import copy

import torch
import torch_pruning as tp
from torch import Tensor, nn

from mtprune_utils.core.groups import trace_graph
from mtprune_utils.core.pruner import Pruner
from mtprune_utils.core.scoring import GRADIENT, WEIGHTS, Criterion, Signals


class CriterionImportance(tp.importance.Importance):
    """The scores of one of our criteria, as an importance for Torch-Pruning's pruners.

        importance = CriterionImportance(model, (images,), model.trunk, "cosprune")
        pruner = tp.pruner.BasePruner(model, (images,), importance=importance, ...)
        importance.backward(losses)  # for sum(losses.values()).backward(), on every minibatch
        pruner.step()
        importance.renew()           # then train and score on, before the next step

    What it is made of is what a `Pruner` is made of: that one finds the groups and keeps the
    scores, `pruner`. Filters of which it has no group (the heads', what makes outputs, what is to
    be left alone) have no importance, so that Torch-Pruning leaves them alone as well.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: tuple,
        trunk: nn.Module | str | None = None,
        criterion: str | Criterion = "taylor",
        *,
        leave: tuple[nn.Module | str, ...] = (),
        seed: int = 0,
    ):
        self._made_of = (model, example_inputs, trunk, criterion)
        self._options = {"leave": leave, "seed": seed}
        self._trace()

    def _trace(self) -> None:
        self.pruner = Pruner(*self._made_of, **self._options)
        self._parameters = list(self.pruner.model.parameters())
        self._scores: dict[int, Tensor] = {}

    def renew(self) -> None:
        """Begin new scores of the network as it is now: after each step of Torch-Pruning's."""
        self.pruner.scores.close()
        self._trace()

    def backward(self, losses: dict[str, Tensor]) -> None:
        """As `Pruner.backward`: the gradient of the losses' sum, and scores on the way.

        Raises RuntimeError if the network was pruned and the scores were not renewed.
        """
        self._check_same()
        self._scores = {}
        self.pruner.backward(losses)

    def _check_same(self) -> None:
        if not _same(self._parameters, self.pruner.model):
            raise RuntimeError(
                "the network has other parameters than when these scores were begun: call renew() "
                "after each step, then backward(losses) again"
            )

    def __call__(self, group: tp.Group) -> Tensor | None:
        """(indices,) scores of Torch-Pruning's group, by its first layer; None: leave it alone.

        Scores are made of all groups at once, as votes and ranks need it. Raises RuntimeError if no
        minibatch was scored, or the network was pruned and the scores were not renewed.
        """
        self._check_same()
        names = {module: name for name, module in self.pruner.model.named_modules()}
        dep, indices = group[0]
        makes = group._DG.is_out_channel_pruning_fn(dep.handler)  # else it reads them
        root = names.get(dep.target.module), makes
        for i, ours in enumerate(self.pruner.groups):
            for member in [m for m in ours.members if (m.name, m.produces) == root]:
                units = dict(zip(member.positions.tolist(), member.units.tolist()))
                if units.keys() >= set(indices):
                    return self._of_group(i)[[units[index] for index in indices]]
        return None

    def _of_group(self, i: int) -> Tensor:
        """Made for all groups at once, given out once: asked again, it is of the weights then."""
        if i not in self._scores:
            self._scores = dict(enumerate(self.pruner.scores.mean()))
        return self._scores.pop(i)


def criterion_of(
    importance: tp.importance.Importance,
    model: nn.Module,
    example_inputs: tuple,
    needs: str | None = None,
) -> Criterion:
    """One of Torch-Pruning's importances, as a criterion for our `Pruner` of the same network.

        criterion = criterion_of(tp.importance.LAMPImportance(), model, (images,))
        pruner = Pruner(model, (images,), model.trunk, criterion)

    A unit's score is the mean importance of its filters. needs: "weights": it is asked when filters
    are chosen; "gradient": on every minibatch, with no other's gradient in `.grad`, and the average
    counts; by default "gradient" for Torch-Pruning's Taylor, else "weights". Raises ValueError for
    its Hessian, which would overwrite the gradient that the network is trained by.
    """
    if isinstance(importance, tp.importance.GroupHessianImportance):
        raise ValueError(
            "Torch-Pruning's Hessian importance overwrites .grad, by which the network is trained: "
            "take our criterion fisher, E w^2 g^2 as well"
        )
    if needs is None:
        taylor = isinstance(importance, tp.importance.GroupTaylorImportance)
        needs = GRADIENT if taylor else WEIGHTS
    name, theirs = type(importance).__name__, _TheirGroups(model, example_inputs)

    def statistics(signals: Signals, generator: torch.Generator) -> Tensor:
        group = signals.group
        try:
            found = importance(theirs.like(signals))
        except (AttributeError, TypeError) as error:  # None where it expects a gradient
            hint = "if it reads gradients, say needs='gradient' and let all losses depend on it"
            raise ValueError(f"{name} fails on {group.root} ({error}): {hint}") from error
        if found is None or found.shape != (group.width,):
            got = "nothing" if found is None else f"shape {tuple(found.shape)}"
            what = f"{name} must give one number for each of {group.width} filters of {group.root}"
            raise ValueError(f"{what}, got {got}: leave it alone, or take another importance")
        root = next(m for m in group.members if m.produces and m.name == group.root)
        units, at = root.units.to(found.device), root.positions.to(found.device)
        total = found.new_zeros(group.units).index_add(0, units, found[at])
        return total / units.bincount(minlength=group.units)

    return Criterion(name, needs, statistics)


class _TheirGroups:
    """Torch-Pruning's groups of a network as it is now, traced anew after each removal."""

    def __init__(self, model: nn.Module, example_inputs: tuple):
        self._model, self._inputs = model, example_inputs
        self._tensors: dict[str, nn.Parameter] = {}  # that the groups are of
        self._groups: dict[str, tp.Group] = {}

    def like(self, signals: Signals) -> tp.Group:
        """Theirs of all filters of the layer that ours begins with."""
        if signals.tensors is not self._tensors:  # new scores are begun at every removal
            self._trace(signals.tensors)
        ours = signals.group
        if ours.root not in self._groups:
            root = self._copy.get_submodule(ours.root)
            start = self._graph.get_pruner_of_module(root).prune_out_channels
            every = list(range(ours.width))
            self._groups[ours.root] = self._graph.get_pruning_group(root, start, every)
        return self._groups[ours.root]

    def _trace(self, tensors: dict[str, nn.Parameter]) -> None:
        if not _same(list(tensors.values()), self._model):
            raise ValueError("criterion_of was given another network than the one that is scored")
        # A copy is traced, as in `groups.trace`; then its nodes stand for the network's own layers.
        self._copy = copy.deepcopy(self._model).eval().requires_grad_(True)
        device = next(self._model.parameters()).device
        inputs = tuple(x.to(device) if torch.is_tensor(x) else x for x in self._inputs)
        with torch.enable_grad():
            self._graph = trace_graph(self._copy, inputs)
        names = {part: name for name, part in _parts(self._copy).items()}
        own = _parts(self._model)
        for node in self._graph.module2node.values():
            node.module = own.get(names.get(node.module), node.module)
        self._tensors, self._groups = tensors, {}


def _parts(model: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    return dict(model.named_modules()) | dict(model.named_parameters())


def _same(parameters: list[nn.Parameter], model: nn.Module) -> bool:
    """Whether these are the network's: removal makes new ones."""
    own = list(model.parameters())
    return len(own) == len(parameters) and all(a is b for a, b in zip(own, parameters))
