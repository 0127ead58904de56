"""Recipes as data: how a backbone and a classifier are trained, under a name that a command line can say.

A learning-rate schedule is one multiplier of the base rate for every step, known before the first.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from pydantic import Field, ValidationError, model_validator

from tailscope.errors import UserError, unknown
from tailscope.methods import AUGMENTATIONS, LOSSES, MIXINGS, PHOTO_AUGMENTATIONS, SAMPLERS, TASKS, WEIGHTS, for_photos
from tailscope.networks import LAST_LAYERS, MODELS
from tailscope.plugins import Plugin
from tailscope.registry import Registry, plugins_named, split_call
from tailscope.spec import BnMode, DataSpec, Frozen, StageSpec, Start, TrainSpec
from tailscope.training import SCHEDULES


@SCHEDULES.register("cosine")
def cosine(steps: int, steps_per_epoch: int, /) -> list[float]:
    """Half a cosine from 1 down to 0, without warm-up."""
    return [0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]


@SCHEDULES.register("multistep")
def multistep(
    steps: int, steps_per_epoch: int, /, warmup: int = 5, drops: tuple[int, ...] = (160, 180), factor: float = 0.01
) -> list[float]:
    """Constant within an epoch: (e+1)/warmup in the first `warmup` epochs, times `factor` at each epoch in `drops`."""
    epochs = [step // steps_per_epoch for step in range(steps)]
    return [min(1.0, (e + 1) / max(1, warmup)) * factor ** sum(e >= drop for drop in drops) for e in epochs]


@SCHEDULES.register("onecycle")
def onecycle(steps: int, steps_per_epoch: int, /, peak: float = 0.25, start: float = 0.1) -> list[float]:
    """Linear from `start` up to 1 at the fraction `peak` of all steps, then linear down to nearly 0.

    Smith and Topin (2019), with straight lines.

    Raises:
        UserError: `peak` is not strictly between 0 and 1.
    """
    if not 0 < peak < 1:
        raise UserError(f"schedule onecycle: peak={peak} must lie strictly between 0 and 1")
    top = peak * steps
    up = [start + (1 - start) * step / top for step in range(math.ceil(top))]
    return [*up, *((steps - step) / (steps - top) for step in range(len(up), steps))]


def require_fitting(stage: StageSpec) -> None:
    """Refuse a stage whose loss, last layer, mixing and sampler do not fit each other.

    Raises:
        UserError: the loss needs what the last layer does not compute, or images that are not mixed; two branches meet
            another mixing or pre-training; or the sampler changes with time, in stage 2, whose samples are drawn
            beforehand.
    """
    _require_last_layer(stage.loss, stage.last_layer)
    mixes = stage.mix or (stage.second_sampler and "two branches")
    if "unmixed" in LOSSES.needs(stage.loss) and mixes:
        raise UserError(f"loss {stage.loss}: means nothing for mixed images; take another, or leave out {mixes}")
    if stage.second_sampler and (other := stage.mix or stage.pretrain):
        raise UserError(f"a network of two branches cannot be trained with {other}; leave one of the two out")
    if stage.model is None and "progress" in SAMPLERS.needs(stage.sampler):
        raise UserError(
            f"sampler {stage.sampler}: changes while a stage is trained, and stage 2's samples are drawn before it"
            " begins; take one that stays the same, such as class_balanced"
        )


COMPUTES = {"cosine": ("cosines", "cosine"), "distance": ("distances", "prototypes")}
"""By what a loss may need of the last layer: the method that computes it, and a last layer that has it."""


def _require_last_layer(loss: str, last_layer: str) -> None:
    for what, known in (COMPUTES[need] for need in LOSSES.needs(loss) if need in COMPUTES):
        from tailscope.networks.last_layers import computes

        if not computes(what, last_layer):
            raise UserError(
                f"loss {loss}: needs a network that ends in {what}, and the last layer {last_layer} computes none; take"
                f" the last layer {LAST_LAYERS.canonical(known)}"
            )


def augmentations_of(calls: Sequence[str]) -> Registry[Any]:
    """Return the registry that call-strings of augmentations are of: for photographs in files, or for tensors."""
    return PHOTO_AUGMENTATIONS if for_photos(calls) else AUGMENTATIONS


def with_plugins(stage: StageSpec) -> StageSpec:
    """Return a stage that says which code from outside the package its call-strings name."""
    named: list[tuple[Registry[Any], str]] = [
        (SCHEDULES, stage.train.schedule),
        (LOSSES, stage.loss),
        (SAMPLERS, stage.sampler),
        *((augmentations_of(stage.augment), call) for call in stage.augment),
        (LAST_LAYERS, stage.last_layer),
        *((one, call) for one, call in ((MODELS, stage.model), (MIXINGS, stage.mix), (WEIGHTS, stage.weights)) if call),
        *((TASKS, call) for call in (stage.pretrain, stage.task) if call),
        *((SAMPLERS, call) for call in (stage.second_sampler,) if call),
    ]
    return stage.model_copy(update={"plugins": tuple((one.name, one.sha256) for one in plugins_named(named))})


def _listed(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


class _Choice(NamedTuple):
    """A field of recipes that names one method: which stage has it, as what, of which registry."""

    stage: str
    what: str
    registry: Registry[Any]


CHOICES = {
    "model": _Choice("Stage 1", "model", MODELS),
    "loss": _Choice("Stage 1", "loss", LOSSES),
    "last_layer": _Choice("Stage 1", "last layer", LAST_LAYERS),
    "weights": _Choice("Stage 1", "class weights", WEIGHTS),
    "sampler": _Choice("Stage 1", "sampler", SAMPLERS),
    "always_mix": _Choice("Stage 1", "mixing", MIXINGS),
    "pretrain": _Choice("Stage 1", "pre-training", TASKS),
    "stage2_loss": _Choice("Stage 2", "loss", LOSSES),
    "stage2_sampler": _Choice("Stage 2", "sampler", SAMPLERS),
}
"""What `Recipe.with_methods` may replace, and options of experiments say: one more is a line here, a field of `Recipe`,
one of `experiments.options.Request` and its place in `Recipe.backbone` or `Recipe.classifier`."""


class Recipe(Frozen):
    """Everything about an experiment but its data and seeds.

    Attributes:
        card: what a reader should know about it.
        converged: whether geometry measured after it may decide a claim of the paper.
        views: how many augmented views stage 2 sees.
        augment: the augmentations that are on everywhere.
        autoaugment: what "AutoAugment" adds to them.
        mix: what "MixUp" is.
        bn_mode: what stage 2 does with the backbone's batch normalisation.
        loss, stage2_loss: what the stages minimise, as call-strings.
        sampler, stage2_sampler: how the stages draw, where an experiment does not say it.
        always_mix: what mixes the batches of every backbone, if anything, also where an experiment asks for no MixUp.
        stage2_start: what stage 2's classifier starts from, see `StageSpec.start`.
        stage2_augment: whether stage 2 sees augmented views; without, one view of the images as they are.
        last_layer: what turns features into logits in stage 1, see `StageSpec.last_layer`.
        weights: the classes' weights in stage 1's loss, see `StageSpec.weights`.
        pretrain: the task that backbones are pre-trained on, see `StageSpec.pretrain`.
    """

    name: str
    card: str
    converged: bool
    model: str
    stage1: TrainSpec
    stage2: TrainSpec
    views: int = Field(ge=1)
    augment: tuple[str, ...] = ("crop(padding=4)", "flip")
    autoaugment: str = "autoaugment()"
    mix: str = "mixup(alpha=1.0)"
    bn_mode: BnMode = "frozen"
    loss: str = "cross_entropy"
    stage2_start: Start = "new"
    stage2_augment: bool = True
    last_layer: str = "linear"
    weights: str | None = None
    sampler: str = "instance"
    stage2_loss: str = "cross_entropy"
    stage2_sampler: str = "instance"
    always_mix: str | None = None
    pretrain: str | None = None
    later = (
        "bn_mode", "loss", "stage2_start", "stage2_augment", "last_layer", "weights", "sampler", "stage2_loss",
        "stage2_sampler", "always_mix", "pretrain",
    )  # fmt: skip

    @model_validator(mode="after")
    def _spell_out(self) -> Self:
        """Write every call-string in full, so that a default that changes later does not change a stored key."""
        augmentations = augmentations_of(self.augment)
        spelled = {
            "augment": tuple(augmentations.canonical(call) for call in self.augment),
            "autoaugment": augmentations.canonical(self.autoaugment),
            "mix": MIXINGS.canonical(self.mix),
            **{name: one.registry.canonical(call) for name, one in CHOICES.items() if (call := getattr(self, name))},
        }
        for name, value in spelled.items():
            object.__setattr__(self, name, value)
        for train in (self.stage1, self.stage2):
            object.__setattr__(train, "schedule", SCHEDULES.canonical(train.schedule))
        _require_last_layer(self.loss, self.last_layer)
        return self

    def backbone(self, data: DataSpec, *, autoaugment: bool = False, mix: bool = False) -> StageSpec:
        """Return stage 1 on `data`, optionally with AutoAugment and MixUp.

        Raises:
            UserError: the loss cannot take mixed images.
        """
        stage = StageSpec(
            data=data,
            train=self.stage1,
            model=self.model,
            augment=self._augment(autoaugment),
            loss=self.loss,
            mix=self.mix if mix else self.always_mix,
            sampler=self.sampler,
            last_layer=self.last_layer,
            weights=self.weights,
            pretrain=self.pretrain,
        )
        require_fitting(stage)
        return with_plugins(stage)

    def classifier(self, data: DataSpec, *, sampler: str | None = None, autoaugment: bool = False) -> StageSpec:
        """Return stage 2 on `data`: a linear classifier on `views` augmented views of frozen features.

        `sampler` None leaves the choice to the recipe.

        Raises:
            UserError: the sampler changes with time.
        """
        augmented = self.stage2_augment or autoaugment
        stage = StageSpec(
            data=data,
            train=self.stage2,
            augment=self._augment(autoaugment) if augmented else (),
            loss=self.stage2_loss,
            sampler=sampler or self.stage2_sampler,
            views=self.views if augmented else 1,
            bn_mode=self.bn_mode,
            start=self.stage2_start,
        )
        require_fitting(stage)
        return with_plugins(stage)

    def plugins(self) -> list[Plugin]:
        """Return the code from outside the package that anything of this recipe names, each once, by name."""
        calls = [
            *((one.registry, call) for name, one in CHOICES.items() if (call := getattr(self, name))),
            *((augmentations_of(self.augment), call) for call in (*self.augment, self.autoaugment)),
            *((SCHEDULES, train.schedule) for train in (self.stage1, self.stage2)),
            (MIXINGS, self.mix),
        ]
        return plugins_named(calls)

    def with_bn_mode(self, mode: BnMode) -> "Recipe":
        """Return this recipe with another batch-norm mode of stage 2, which its card then names."""
        return self._with(f"Stage 2 with {mode} batch normalisation.", bn_mode=mode)

    def with_methods(self, **calls: str | None) -> "Recipe":
        """Return this recipe with other methods, fields of `CHOICES`, which its card then names; None changes nothing.

        Raises:
            UserError: there is none of that name, it has no such parameter, or they do not fit each other.
        """
        changes = {name: CHOICES[name].registry.canonical(call) for name, call in calls.items() if call}
        changes = {name: call for name, call in changes.items() if call != getattr(self, name)}
        named: dict[str, list[str]] = {}
        for name, call in changes.items():
            named.setdefault(CHOICES[name].stage, []).append(f"the {CHOICES[name].what} {call}")
        said = " ".join(f"{stage} has {_listed(these)}." for stage, these in named.items())
        changed = self._with(said, **changes)
        _require_last_layer(changed.loss, changed.last_layer)
        return changed

    def with_schedule(self, schedule: str | None) -> "Recipe":
        """Return this recipe with another schedule of stage 1's learning rate, which its card then names.

        Raises:
            UserError: there is none of that name, or it has no such parameter.
        """
        call = SCHEDULES.canonical(schedule or self.stage1.schedule)
        return self._with(f"Stage 1 has the schedule {call}.", stage1=self.stage1.model_copy(update={"schedule": call}))

    def with_augment(self, augment: Sequence[str] | None) -> "Recipe":
        """Return this recipe with other augmentations that are on everywhere, which its card then names.

        `["none"]` is none at all.

        Raises:
            UserError: one is unknown, or they are for images in files and the recipe's are not, or the other way round.
        """
        if augment is None:
            return self
        asked = [] if list(augment) == ["none"] else list(augment)
        if for_photos(asked) != for_photos(self.augment):
            kind = "files, so the first must be resized_crop" if for_photos(self.augment) else "memory, not in files"
            raise UserError(f"--augment {' '.join(augment)}: the recipe {self.name} is for images in {kind}")
        calls = tuple(augmentations_of(asked).canonical(call) for call in asked)
        return self._with(f"Images are augmented by {', then '.join(calls) or 'nothing'}.", augment=calls)

    def with_micro_batches(self, parts: int) -> "Recipe":
        """Return this recipe with stage 1's batches cut into `parts` (see `TrainSpec`), which its card then says."""
        said = f"Stage 1's batches are cut into {parts}, each with batch statistics of its own."
        return self._with(said, stage1=self.stage1.model_copy(update={"micro_batches": parts}))

    def _with(self, said: str, **changes: Any) -> "Recipe":
        """Return this recipe, or where something changes another whose card says so."""
        if all(getattr(self, field) == value for field, value in changes.items()):
            return self
        return self.model_copy(update={**changes, "card": f"{self.card} {said}"})

    def _augment(self, autoaugment: bool) -> tuple[str, ...]:
        return (*self.augment, self.autoaugment) if autoaugment else self.augment


_STAGE2 = TrainSpec(epochs=10, batch=512, learning_rate=0.05, weight_decay=2e-4)
_SHORT_STAGE2 = _STAGE2.model_copy(update={"epochs": None, "steps": 4_000})
_ONE_CYCLE = TrainSpec(steps=3_000, batch=128, learning_rate=0.2, nesterov=True, weight_decay=5e-4, schedule="onecycle")
_PAPER_STAGE1 = TrainSpec(epochs=200, batch=128, learning_rate=0.1, weight_decay=2e-4, schedule="multistep")

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="demo",
            card="Digits in seconds: ResNet-8, 400 one-cycle steps a backbone, 500 steps a classifier. Crops by 1"
            " pixel, flips nothing (a mirrored digit is another sign), AutoAugment without flips and inversion."
            " Shortened: geometry is not converged.",
            converged=False,
            model="resnet8",
            stage1=_ONE_CYCLE.model_copy(update={"steps": 400, "batch": 64, "learning_rate": 0.1, "precision": "fp32"}),
            stage2=TrainSpec(steps=500, batch=64, learning_rate=0.1, weight_decay=2e-4, precision="fp32"),
            views=4,
            augment=("crop(padding=1)",),
            autoaugment="autoaugment(exclude=('invert',))",
        ),
        Recipe(
            name="fast",
            card="3,000 one-cycle steps a backbone and 4,000 steps a classifier, whatever the data; 2 augmented views"
            " in stage 2. Shows orderings, not the paper's shares: geometry is not converged.",
            converged=False,
            model="resnet32",
            stage1=_ONE_CYCLE,
            stage2=_SHORT_STAGE2,
            views=2,
        ),
        Recipe(
            name="paper",
            card="The paper's section 3 with stage-1 learning rate 0.1: the recipe that it says it follows uses 0.1,"
            " and 93 % on the full CIFAR-10 is what 0.1 gives.",
            converged=True,
            model="resnet32",
            stage1=_PAPER_STAGE1,
            stage2=_STAGE2,
            views=10,
        ),
        Recipe(
            name="paper-as-printed",
            card="The paper's section 3 to the letter: stage-1 learning rate 0.01.",
            converged=True,
            model="resnet32",
            stage1=_PAPER_STAGE1.model_copy(update={"learning_rate": 0.01}),
            stage2=_STAGE2,
            views=10,
        ),
        Recipe(
            name="miniature",
            card="A rehearsal: seconds, no result means anything. ResNet-8 of four channels, 48 steps a backbone and as"
            " many a classifier, whatever the data.",
            converged=False,
            model="resnet8(width=4)",
            stage1=TrainSpec(steps=48, batch=64, learning_rate=0.1, weight_decay=2e-4, schedule="onecycle"),
            stage2=TrainSpec(steps=48, batch=64, learning_rate=0.1, weight_decay=2e-4),
            views=1,
        ),
    )
}


PARAMETRISED: Registry[Recipe] = Registry("recipe")
"""Recipes that a call-string may change, such as `imagenet(size=128, epochs=30)`."""


@PARAMETRISED.register("demo")
def demo(learning_rate: float = 0.1) -> Recipe:
    """Train as `demo` does, stage 1 with another learning rate."""
    return _changed("demo", stage1={"learning_rate": learning_rate})


@PARAMETRISED.register("fast")
def fast(learning_rate: float = 0.2) -> Recipe:
    """Train as `fast` does, stage 1 with another learning rate, which must be lower where training diverges."""
    return _changed("fast", stage1={"learning_rate": learning_rate})


@PARAMETRISED.register("paper")
def paper(
    stage2_epochs: int = 10, stage2_start: Start = "new", stage2_augment: bool = True, learning_rate: float = 0.1
) -> Recipe:
    """Follow the paper's section 3 on CIFAR with another stage 2: 10 epochs may not finish new classifiers.

    Args:
        stage2_epochs: how long classifiers are trained.
        stage2_start: what they start from: "new" weights, or those of "stage1".
        stage2_augment: whether they see crops and flips; AutoAugment, where a rung asks for it, they see in any case.
        learning_rate: of stage 1.
    """
    stages = {"stage1": {"learning_rate": learning_rate}, "stage2": {"epochs": stage2_epochs}}
    return _changed("paper", **stages, stage2_start=stage2_start, stage2_augment=stage2_augment)


def _changed(name: str, **changes: Any) -> Recipe:
    """Return a recipe with some of its fields, or of its stages' fields, changed and checked."""
    values = RECIPES[name].model_dump()
    for field, change in changes.items():
        values[field] = {**values[field], **change} if isinstance(change, dict) else change
    return Recipe.model_validate(values)


@PARAMETRISED.register("imagenet")
def imagenet(
    size: int = 224, width: int = 64, epochs: int = 100, batch: int = 512, learning_rate: float = 0.2, views: int = 10
) -> Recipe:
    """Follow the paper's section 3 for ImageNet-LT: ResNet-10 on photographs in files.

    Args:
        size: side of the training crops, in pixels; the centre crop of evaluation has it too.
        width: channels of the first block; features have eight times as many.
        epochs: of stage 1; the learning rate falls to a tenth at 30, 60 and 80 % of them.
        batch: of stage 1.
        learning_rate: of stage 1.
        views: how many augmented views stage 2 sees.

    Raises:
        UserError: the crops are so small that the last stage would see one pixel, or `width` is not positive.
    """
    if size < 17 or width < 1:
        raise UserError(f"recipe imagenet(size={size}, width={width}): size must be at least 17 and width 1")
    drops = tuple(round(share * epochs) for share in (0.3, 0.6, 0.8))
    return Recipe(
        name="imagenet",
        card="The paper's section 3 for ImageNet-LT: ResNet-10, crops of 8 to 100 % of the area, flips, colour jitter"
        " 0.4, and 1/10 of the learning rate at 30, 60 and 80 % of the epochs.",
        converged=epochs >= 100,
        model=f"resnet10(width={width})",
        stage1=TrainSpec(
            epochs=epochs,
            batch=batch,
            learning_rate=learning_rate,
            weight_decay=1e-4,
            schedule=f"multistep(warmup=0, drops={drops}, factor=0.1)",
        ),
        stage2=_STAGE2,
        views=views,
        augment=(f"resized_crop(size={size})", "color_jitter", "flip"),
        autoaugment="autoaugment_imagenet",
    )


RECIPES["imagenet"] = imagenet()
RECIPES["imagenet-fast"] = Recipe(
    name="imagenet-fast",
    card="10,000 one-cycle steps a backbone at 128 pixels and 4,000 steps a classifier, whatever the data; 2 augmented"
    " views in stage 2. Shows orderings, not the paper's shares: geometry is not converged.",
    converged=False,
    model="resnet10",
    stage1=_ONE_CYCLE.model_copy(update={"steps": 10_000, "batch": 256, "weight_decay": 1e-4}),
    stage2=_SHORT_STAGE2,
    views=2,
    augment=("resized_crop(size=128)", "flip"),
    autoaugment="autoaugment_imagenet",
)


def recipe_by_name(name: str) -> Recipe:
    """Return the recipe of a name, or of a call-string such as `imagenet(size=128, epochs=30)`.

    Raises:
        UserError: there is none of that name (the known are listed), or it has no such parameter.
    """
    if name in RECIPES:
        return RECIPES[name]
    called = split_call(name, "recipe")[0] if "(" in name else name
    if called not in [entry.name for entry in PARAMETRISED]:
        raise unknown("--recipe", name, [recipe.name for recipe in recipes()])
    values, default = (PARAMETRISED.parse(call)[1] for call in (name, called))
    changed = ", ".join(f"{k}={v!r}" for k, v in values.items() if v != default[k])
    if not changed and called in RECIPES:
        return RECIPES[called]
    try:
        recipe = PARAMETRISED.make(name)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--recipe {name}: {first.get('ctx', {}).get('error', first['msg'])}") from None
    if not changed:
        return recipe
    return recipe.model_copy(update={"name": f"{called}({changed})", "card": f"{recipe.card} With {changed}."})


def recipes() -> list[Recipe]:
    """Return every recipe, those from outside the package with their defaults."""
    return [*RECIPES.values(), *(PARAMETRISED.make(one.name) for one in PARAMETRISED if one.name not in RECIPES)]
