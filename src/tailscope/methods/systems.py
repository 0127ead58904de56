"""Methods that `tailscope compare` compares: what each changes in training, and how its classifier comes about.

A method is data. It changes fields of stage 1 (`StageSpec`: loss, sampler, mix ...), never how long it is optimised nor
what on; only pre-training, a stage before it, adds steps. Its classifier is that of stage 1; or one that stage 2 trains
on frozen features, by changes of its fields; or one of the registry of classifiers, fitted to the features of the
training images. A classifier that is made from another one gets the network's own as its `base`. `autoaugment` in
either stage adds what the recipe calls AutoAugment.

Defaults are the published values where the docstring names no other reason. `grid` has the values that may be tried
instead on a validation cut; a value that is written out is not tried.

Methods add up: `mixup + crt` has the stage 1 of the one and the classifier of the other; a published system that is
such a sum has no entry of its own. Whatever else is registered is a method by itself: a loss, class weights, a sampler,
a mixing or an augmentation of stage 1, or a classifier on its features.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from tailscope.errors import UserError, unknown
from tailscope.methods import AUGMENTATIONS, LOSSES, MIXINGS, SAMPLERS, SYSTEMS, TASKS, WEIGHTS
from tailscope.registry import Registry, split_call
from tailscope.spec import BnMode

FIXED = ("data", "train", "model", "views")
"""Fields of a stage that no method changes: all are optimised alike, on the same images."""


@dataclass(frozen=True, kw_only=True)
class System:
    """What a method changes.

    Attributes:
        stage1: fields of stage 1 by name; `augment` is added to the recipe's.
        stage2: fields of a stage 2 by name; None where there is none.
        classifier: call-string of a classifier that is fitted to un-augmented features of the training images.
        bn_mode: what batch normalisation does with the backbone that this classifier sees, as in `StageSpec`; stage 2
            has a field of its own.
        grid: values of hyper-parameters that a validation cut may choose from.
    """

    stage1: Mapping[str, Any] = field(default_factory=dict)
    stage2: Mapping[str, Any] | None = None
    classifier: str | None = None
    bn_mode: BnMode = "frozen"
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what would make a comparison unfair (a mistake of the code that registers)."""
        if found := {*self.stage1, *(self.stage2 or {})} & {*FIXED}:
            raise ValueError(f"a method may not change {sorted(found)[0]!r} of a stage")

    def __add__(self, other: "System") -> "System":
        """Return what both change; `UserError` where they change the same."""
        stages = [self.stage1, other.stage1], [self.stage2 or {}, other.stage2 or {}]
        twice = [
            n for k, (first, second) in enumerate(stages) for n in first if n in second and (k, n) != (0, "augment")
        ]
        twice += ["classifier"] if self.classifier and other.classifier else []
        if twice:
            raise UserError(f"both set the {twice[0]}")
        augment = [call for one in stages[0] for call in one.get("augment", ())]
        return System(
            stage1={**self.stage1, **other.stage1, **({"augment": augment} if augment else {})},
            stage2={**stages[1][0], **stages[1][1]} if (self.stage2, other.stage2) != (None, None) else None,
            classifier=self.classifier or other.classifier,
            bn_mode=self.bn_mode if self.classifier else other.bn_mode,
        )


# -- call-strings ---------------------------------------------------------------------------------------------------

_AD_HOC: dict[str, Registry[Any]] = {
    "loss": LOSSES,
    "weights": WEIGHTS,
    "sampler": SAMPLERS,
    "mix": MIXINGS,
    "augment": AUGMENTATIONS,
    "pretrain": TASKS,
}
"""Fields of stage 1 that something which is registered changes by itself."""


@dataclass(frozen=True)
class Part:
    """One summand of a method: its kind ("" for a registered method), its registry, name and values.

    `open` are the hyper-parameters that were not written out.
    """

    kind: str
    registry: Registry[Any]
    name: str
    values: Mapping[str, Any]
    open: frozenset[str]

    @property
    def call(self) -> str:
        """The part's call-string in full; of what is no registered method, after its kind."""
        values = ", ".join(f"{name}={value!r}" for name, value in self.values.items())
        written = f"{self.name}({values})" if values else self.name
        return f"{self.kind}:{written}" if self.kind else written

    def system(self) -> System:
        """Return what it changes."""
        call = self.call.removeprefix(f"{self.kind}:")
        if not self.kind:
            made: System = self.registry.make(call)
            return made
        if self.kind == "classifier":
            return System(classifier=call)
        return System(stage1={self.kind: [call] if self.kind == "augment" else call})


@dataclass(frozen=True)
class Method:
    """A method as asked for: a sum of parts under the name that the user wrote."""

    name: str
    parts: tuple[Part, ...]

    @property
    def call(self) -> str:
        """Everything that it is, written in full."""
        return " + ".join(part.call for part in self.parts)

    def system(self) -> System:
        """Return what all parts change together; `UserError` where two change the same."""
        whole = System()
        for part in self.parts:
            try:
                whole += part.system()
            except UserError as error:
                raise UserError(f"--methods {self.name}: {error}") from None
        return whole

    def choices(self) -> list["Method"]:
        """Return the method at each point of its grid, as given first; only this one where nothing is left open."""
        grids = [[dict(point) for point in _points(part)] for part in self.parts]
        found = [
            Method(self.name, tuple(self._at(part, chosen) for part, chosen in zip(self.parts, point, strict=True)))
            for point in itertools.product(*grids)
        ]
        return [self, *(one for one in found if one != self)]

    @staticmethod
    def _at(part: Part, chosen: Mapping[str, Any]) -> Part:
        return Part(part.kind, part.registry, part.name, {**part.values, **chosen}, part.open)


def _points(part: Part) -> Iterator[tuple[tuple[str, Any], ...]]:
    grid = {name: values for name, values in part.system().grid.items() if name in part.open}
    yield from itertools.product(*([(name, value) for value in values] for name, values in grid.items()))


def parse(text: str, classifiers: Registry[Any]) -> list[Method]:
    """Return the methods that a list like `ce; tau(tau=0.7); mixup + crt` names.

    `classifiers` is the registry of classifiers on features, which stands above this module.

    Raises:
        UserError: a name is unknown or means several things, a method is given twice, or there are fewer than two.
    """
    found: list[Method] = []
    for written in filter(None, (part.strip() for part in _split(text, ";"))):
        method = Method(
            " ".join(written.split()), tuple(_part(one, written, classifiers) for one in _split(written, "+"))
        )
        method.system()
        for other in found:
            if other.parts == method.parts:
                raise UserError(f"--methods: {other.name} and {method.name} are the same method; leave one out")
            if other.name == method.name:
                raise UserError(f"--methods: {method.name} is given twice")
        found.append(method)
    if len(found) < 2:
        raise UserError(
            "--methods: give at least two, separated by `;`, the first being the baseline, such as 'ce; crt'"
        )
    return found


def _part(text: str, method: str, classifiers: Registry[Any]) -> Part:
    """Return a summand: `NAME(...)` of a registered method or of one other registry, or `KIND:NAME(...)`."""
    others: dict[str, Registry[Any]] = {**_AD_HOC, "classifier": classifiers}
    kind, colon, call = text.strip().partition(":")
    if not colon or "(" in kind:
        kind, call = "", text.strip()
    elif kind not in others:
        raise UserError(f"--methods {method}: {unknown('kind', kind, others)}")
    name = call.partition("(")[0].strip()
    if not kind and name not in {entry.name for entry in SYSTEMS}:
        kinds = [one for one, registry in others.items() if name in {entry.name for entry in registry}]
        if len(kinds) > 1:
            raise UserError(f"--methods {method}: {name} is {' and '.join(kinds)}; write {kinds[0]}:{name}")
        kind = kinds[0] if kinds else ""
    registry = others.get(kind, SYSTEMS)
    entry, values = registry.parse(call)
    _, args, kwargs = split_call(call)
    return Part(kind, registry, entry.name, values, frozenset(list(values)[len(args) :]) - {*kwargs})


def _split(text: str, mark: str) -> list[str]:
    """Split at a mark outside of parentheses.

    >>> _split("a(b='x;y'); c", ";")
    ["a(b='x;y')", ' c']
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == mark and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


# -- the methods ----------------------------------------------------------------------------------------------------


@SYSTEMS.register("ce")
def ce() -> System:
    """Train as the recipe says, with cross-entropy: the usual baseline."""
    return System(stage1={"loss": "cross_entropy"})


# losses of stage 1


@SYSTEMS.register("focal")
def focal(gamma: float = 2.0) -> System:
    """Focal loss on the softmax (Lin et al. 2017, equation 4)."""
    return System(stage1={"loss": f"focal(gamma={gamma})"}, grid={"gamma": (0.5, 1.0, 2.0)})


@SYSTEMS.register("class_balanced")
def class_balanced(beta: float = 0.9999) -> System:
    """Cross-entropy weighted by the inverse effective number of images (Cui et al. 2019, equation 11)."""
    return System(stage1={"loss": f"class_balanced(beta={beta})"}, grid={"beta": (0.9, 0.99, 0.999, 0.9999)})


@SYSTEMS.register("balanced_softmax")
def balanced_softmax() -> System:
    """Balanced softmax: log counts are added to the logits in training (Ren et al. 2020, equation 4)."""
    return System(stage1={"loss": "balanced_softmax"})


@SYSTEMS.register("logit_adjustment")
def logit_adjustment(tau: float = 1.0) -> System:
    """Logit-adjusted loss, tau log prior added in training (Menon et al. 2021, equation 10); `la` is the post-hoc form.

    At tau = 1 it is the balanced softmax, up to a constant that no softmax sees.
    """
    return System(stage1={"loss": f"logit_adjustment(tau={tau})"}, grid={"tau": (0.5, 1.0, 1.5, 2.0)})


@SYSTEMS.register("label_aware_smoothing")
def label_aware_smoothing(head: float = 0.4, tail: float = 0.1) -> System:
    """Label-aware smoothing of stage 1, more for frequent classes (Zhong et al. 2021, equation 5)."""
    return System(stage1={"loss": f"label_aware_smoothing(head={head}, tail={tail})"}, grid={"head": (0.2, 0.3, 0.4)})


@SYSTEMS.register("drw")
def drw(start: float = 0.8, beta: float = 0.9999) -> System:
    """Deferred re-weighting by the effective number, late in training (Cao et al. 2019, algorithm 1)."""
    return System(stage1={"weights": _deferred(start, beta)}, grid={"start": (0.6, 0.8, 0.9)})


def _deferred(start: float, beta: float) -> str:
    """Return the class weights of Cao et al., whose algorithm 1 divides a step by the sum of its batch's weights."""
    return f"batch_mean(of='drw(start={start}, beta={beta})')"


# sampling, mixing and augmentation of stage 1


@SYSTEMS.register("class_balanced_sampling")
def class_balanced_sampling() -> System:
    """Draw all classes equally often, from the first step on (Kang et al. 2020, equation 1 with q = 0)."""
    return System(stage1={"sampler": "class_balanced"})


@SYSTEMS.register("square_root_sampling")
def square_root_sampling() -> System:
    """Draw classes in proportion to the square root of their counts (Kang et al. 2020, equation 1 with q = 1/2)."""
    return System(stage1={"sampler": "square_root"})


@SYSTEMS.register("mixup")
def mixup(alpha: float = 1.0) -> System:
    """MixUp of images and labels in stage 1 (Zhang et al. 2018, equation 1)."""
    return System(stage1={"mix": f"mixup(alpha={alpha})"}, grid={"alpha": (0.2, 1.0)})


@SYSTEMS.register("autoaugment")
def autoaugment() -> System:
    """Learnt augmentation of stage 1 (Cubuk et al. 2019), with the operations that the recipe names."""
    return System(stage1={"autoaugment": True})


# stage 1 in two parts, and whole systems


@SYSTEMS.register("cost_sensitive")
def cost_sensitive(power: float = 1.0) -> System:
    """Cross-entropy with weights in proportion to 1 / n, over their mean in each batch (Huang et al. 2016).

    `power` is the exponent of n: 1/2 weighs by the square root. Without that mean, most steps would be several times
    shorter than those of other methods.
    """
    changes = {"loss": "cross_entropy", "weights": f"batch_mean(of='inverse(power={power})')"}
    return System(stage1=changes, grid={"power": (0.5, 1.0)})


@SYSTEMS.register("ce_drw")
def ce_drw(start: float = 0.8, beta: float = 0.9999) -> System:
    """Deferred re-weighting of cross-entropy, by effective numbers after 80 % of the steps (Cao et al. 2019, alg. 1).

    It adds to mixings too: `mixup + ce_drw`, `remix + ce_drw` (Chou et al. 2020).
    """
    return System(stage1={"loss": "cross_entropy", "weights": _deferred(start, beta)})


@SYSTEMS.register("ce_drs")
def ce_drs(start: float = 0.8) -> System:
    """Deferred re-sampling with cross-entropy: all classes equally often after 80 % (Cao et al. 2019, section 3.3)."""
    return System(stage1={"loss": "cross_entropy", "sampler": f"drs(start={start})"})


@SYSTEMS.register("ldam")
def ldam(max_margin: float = 0.5, scale: float = 30.0) -> System:
    """Margins in proportion to n^-1/4 on a network that ends in cosines: LDAM (Cao et al. 2019, section 3.2)."""
    return System(
        stage1={"loss": f"ldam(max_margin={max_margin}, scale={scale})", "last_layer": f"cosine(scale={scale})"},
        grid={"max_margin": (0.3, 0.5)},
    )


@SYSTEMS.register("ldam_drw")
def ldam_drw(max_margin: float = 0.5, scale: float = 30.0, start: float = 0.8, beta: float = 0.9999) -> System:
    """LDAM with deferred re-weighting after 80 % of the steps (Cao et al. 2019, algorithm 1)."""
    plain = ldam(max_margin, scale)
    return System(stage1={**plain.stage1, "weights": _deferred(start, beta)}, grid=plain.grid)


@SYSTEMS.register("balanced_softmax_augmented")
def balanced_softmax_augmented() -> System:
    """Balanced softmax with AutoAugment on grey and Cutout, as its authors train CIFAR (Ren et al. 2020, equation 4).

    The augmentation is in their code, and goes before their meta sampler, which is not here: most of the published gain
    over plain balanced softmax is its work.
    """
    return System(stage1={"loss": "balanced_softmax", "augment": ["autoaugment_filled", "cutout"]})


@SYSTEMS.register("bag_of_tricks")
def bag_of_tricks(alpha: float = 1.0, start: float = 0.8) -> System:
    """MixUp, and all classes equally often after 80 % of the steps (after Zhang et al. 2021, AAAI, section 3).

    Left out of the authors' combination: new images that they paste from class activation maps where a class is drawn
    again, and the last epochs without MixUp.
    """
    return System(stage1={"mix": f"mixup(alpha={alpha})", "sampler": f"drs(start={start})"})


@SYSTEMS.register("mislas")
def mislas(alpha: float = 1.0, head: float = 0.4, tail: float = 0.1, bn_mode: str = "frozen") -> System:
    """MixUp, then stage 1's classifier and a scale a class on smoothed targets (Zhong et al. 2021, section 3.3).

    Smoothing (equation 5) is that of CIFAR-100-LT at factor 100; on CIFAR-10-LT the authors take 0.3 and 0. They shift
    the statistics of batch normalisation (section 3.3) on the former only, `bn_mode='shifted'`. Stage 2 is an optimum
    on un-augmented features (the classifier `mislas`), where they take ten epochs with augmentation.

    Raises:
        UserError: `bn_mode` is neither "frozen" nor "shifted".
    """
    if bn_mode not in get_args(BnMode):
        raise unknown("mislas(bn_mode)", bn_mode, get_args(BnMode))
    return System(
        stage1={"mix": f"mixup(alpha={alpha})"},
        classifier=f"mislas(head={head}, tail={tail})",
        bn_mode=cast(BnMode, bn_mode),
        grid={"head": (0.2, 0.3, 0.4)},
    )


@SYSTEMS.register("ssp")
def ssp(length: float = 1.0) -> System:
    """Pre-train on the images without labels, by telling rotations, then train: SSP (Yang and Xu 2020, section 3).

    It goes before any method, as in `ssp + balanced_softmax`, and is the one that is optimised longer than the others:
    `length` times stage 1's steps come before these.
    """
    return System(stage1={"pretrain": f"rotation(length={length})"})


@SYSTEMS.register("bbn")
def bbn() -> System:
    """Two branches, the second on rare classes, and a shift from one to the other: BBN (Zhou et al. 2020, equation 3).

    The branches share all but the last block. Each step shows the first a batch that is drawn as in other methods, and
    the second one drawn in inverse proportion to the counts (equation 4). The classifier adds up alpha W_c f_c and
    (1 - alpha) W_r f_r (equation 1), the loss is alpha L(y_c) + (1 - alpha) L(y_r), and alpha = 1 - (T / T_max)^2 falls
    from step to step (equation 5). In evaluation both branches see an image, alpha is 1/2, and the features are f_c
    beside f_r.

    So a step shows twice as many images as one of other methods, and takes about twice as long.
    """
    return System(stage1={"second_sampler": "reverse"})


@SYSTEMS.register("pseudo_labels")
def pseudo_labels(omega: float = 1.0) -> System:
    """Train on predicted labels of images without labels, too: self-training (Yang and Xu 2020, section 2).

    The images are the training images outside of the long-tailed subset. The network that the method trains without
    them predicts their labels; a second one, which starts anew, minimises L(own labels) + omega L(predicted labels),
    each a sum over images that are drawn equally often. No label of theirs is ever read, but the images are: other
    methods do not see them, so its gain is not that of a method alone. Both networks are optimised for as many steps as
    any other method's, so the second sees each image less often. A classifier that is fitted to its features, as in
    `pseudo_labels + la`, is fitted to both kinds of images; one of a stage 2 to those with labels of their own.

    Raises:
        UserError: `omega` is not positive.
    """
    if not omega > 0:
        raise UserError(f"pseudo_labels(omega={omega}): omega must be positive; without these images leave it out")
    return System(stage1={"unlabelled": omega})


# stage 2, on the frozen backbone


@SYSTEMS.register("crt")
def crt() -> System:
    """Train a new classifier, all classes drawn equally often: cRT (Kang et al. 2020, section 4.1)."""
    return System(stage2={"sampler": "class_balanced"})


@SYSTEMS.register("crt_smoothed")
def crt_smoothed(head: float = 0.4, tail: float = 0.1) -> System:
    """Train a new classifier as cRT does, with label-aware smoothing (Zhong et al. 2021, equation 5)."""
    loss = f"label_aware_smoothing(head={head}, tail={tail})"
    return System(stage2={"sampler": "class_balanced", "loss": loss}, grid={"head": (0.2, 0.3, 0.4)})


# a classifier from the features of the training images


@SYSTEMS.register("la")
def la(tau: float = 1.0) -> System:
    """Logit adjustment after training, tau log prior taken off the logits (Menon et al. 2021, equation 9)."""
    return System(classifier=f"logit_adjustment(tau={tau})", grid={"tau": (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)})


@SYSTEMS.register("tau")
def tau(tau: float = 1.0) -> System:
    """Divide each class's weights by their norm to the power tau, without bias (Kang et al. 2020, equation 5).

    The authors choose tau on validation images; 1 gives all classes the same norm.
    """
    return System(classifier=f"tau_norm(tau={tau}, bias='drop')", grid={"tau": (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)})


@SYSTEMS.register("ncm")
def ncm() -> System:
    """Take the class with the nearest mean feature (Kang et al. 2020, section 4.1)."""
    return System(classifier="ncm")


@SYSTEMS.register("lws")
def lws(l2: float = 0.01) -> System:
    """Learnt weight scaling: one factor a class, trained with class balance (Kang et al. 2020, section 4.1).

    `l2` stands in for the authors' short training and is our own, as in the classifier `lws`.
    """
    return System(classifier=f"lws(l2={l2})", grid={"l2": (0.1, 0.01, 0.001)})


@SYSTEMS.register("disalign")
def disalign(rho: float = 1.2) -> System:
    """Distribution alignment of the logits, by confidence (Zhang et al. 2021, sections 3.2 and 3.3).

    `rho` is the exponent of their generalised class weights; 1 balances the classes.
    """
    return System(classifier=f"disalign(rho={rho})", grid={"rho": (0.8, 1.0, 1.2, 1.5)})
