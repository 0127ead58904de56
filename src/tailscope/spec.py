"""What a run is: frozen, validated values that turn into JSON and into the store's keys.

`RunSpec(stage1, stage2, seed)`: a backbone trained on `stage1.data`, frozen, and a new classifier trained on
`stage2.data`. Swapping the data set between the stages is two stages with different `data`.
"""

import hashlib
import json
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

BnMode = Literal["frozen", "shifted"]
Start = Literal["new", "stage1"]
FORMAT = 1
"""Bumped when the same spec starts to mean another result, so that old stored stages are not taken for new ones."""


class Frozen(BaseModel):
    """An immutable value that refuses unknown fields.

    Those in `later` came after results were stored: at their default they are left out of files and keys.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        for name in self.later:
            if getattr(self, name) == type(self).model_fields[name].default:
                fields.pop(name, None)
        return fields


class DataSpec(Frozen):
    """A training set: rows of a data set. Only its content counts for the key; the rest is for people.

    Attributes:
        name: the data set's name.
        fingerprint: SHA-256 of the whole data set's content.
        profile: how the rows were chosen, as the user wrote it.
        protocol: which published or own rule drew them.
        subset_seed: the seed that drew them.
        indices_sha256: SHA-256 of the rows as int64 little-endian, in the order drawn.
        counts: images per class.
    """

    name: str
    fingerprint: str
    profile: str
    protocol: str
    subset_seed: int
    indices_sha256: str
    counts: tuple[int, ...]

    def content(self) -> dict[str, str]:
        """Return the part that decides what a model trained on it becomes."""
        return {"fingerprint": self.fingerprint, "indices": self.indices_sha256}


class TrainSpec(Frozen):
    """How one stage is optimised: SGD with momentum over `epochs` or `steps` (exactly one of them is given).

    A batch is cut into `micro_batches`, each with batch statistics of its own; their gradients are added up before the
    step. Processes that train together share them out.
    """

    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=2e-4, ge=0)
    schedule: str = "cosine()"
    precision: Literal["auto", "fp32"] = "auto"
    micro_batches: int = Field(default=1, ge=1)
    later = ("micro_batches",)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give epochs or steps, not both")
        return self

    def lengths(self, images: int) -> tuple[int, int]:
        """Return (epochs, total steps) for `images` training images; the last epoch may be cut by `steps`."""
        per_epoch = -(-images // self.batch)
        steps = self.steps or (self.epochs or 0) * per_epoch
        return self.epochs or -(-steps // per_epoch), steps

    def images(self, images: int) -> int:
        """Return how many images training on a set of `images` draws; an epoch's last batch may be short."""
        epochs, rest = divmod(self.lengths(images)[1], -(-images // self.batch))
        return epochs * images + rest * self.batch


class StageSpec(Frozen):
    """One training stage: what is trained on, how samples are drawn and augmented, and how the loss is minimised.

    Attributes:
        data: the training set.
        train: the optimisation.
        model: call-string of the backbone (stage 1; None in stage 2, whose model is a linear classifier).
        augment: call-strings applied in order to every drawn image.
        mix: call-string of a batch mixing such as MixUp, or None.
        loss: call-string of the loss.
        sampler: call-string of the rule that draws an epoch's samples.
        views: stage 2 only: how many augmented views of the data are extracted; epochs cycle through them.
        bn_mode: stage 2 only: what batch normalisation does with the frozen backbone. "frozen" keeps the running
            statistics of stage 1; "shifted" re-estimates them on stage 2's data, weights and affine parameters fixed
            (MiSLAS: Zhong et al. 2021).
        start: stage 2 only: what the classifier starts from, new random weights or those that stage 1 trained.
        last_layer: call-string of what turns features into logits: the classifier's form.
        weights: call-string of the classes' weights in the loss, or None.
        pretrain: stage 1 only: call-string of the task that the backbone is pre-trained on, or None. Pre-training is a
            stage of its own, on the same images and otherwise optimised alike.
        task: of such a stage: what is learnt in place of the labels.
        second_sampler: stage 1 only: call-string of the rule that draws a second batch for each step, which a second
            branch of the network sees (BBN: Zhou et al. 2020); None for a network of one branch.
        unlabelled: stage 1 only: weight of the loss of the training images outside of `data`, whose labels are hidden
            and which a network that this stage trains without them labels (Yang and Xu 2020); None leaves them out.
        plugins: name and SHA-256 of the code from outside the package that the call-strings name (`plugins.Plugin`).
    """

    data: DataSpec
    train: TrainSpec
    model: str | None = None
    augment: tuple[str, ...] = ()
    mix: str | None = None
    loss: str = "cross_entropy"
    sampler: str = "instance"
    views: int | None = Field(default=None, ge=1)
    bn_mode: BnMode = "frozen"
    start: Start = "new"
    last_layer: str = "linear"
    weights: str | None = None
    pretrain: str | None = None
    task: str | None = None
    second_sampler: str | None = None
    unlabelled: float | None = Field(default=None, gt=0)
    plugins: tuple[tuple[str, str], ...] = ()
    later = (
        "bn_mode", "start", "last_layer", "weights", "pretrain", "task", "second_sampler", "unlabelled", "plugins",
    )  # fmt: skip

    @property
    def branches(self) -> int:
        """How many branches the network ends in; each sees a batch of its own in every step."""
        return 1 if self.second_sampler is None else 2

    def epoch(self, images: int) -> int:
        """Return how many images make an epoch: all, or as many as have labels of their own, so that none is longer."""
        return images if self.unlabelled is None else sum(self.data.counts)

    def content(self) -> dict[str, Any]:
        """Return everything about this stage that changes its result."""
        return {**self.model_dump(mode="json", exclude={"data"}), "data": self.data.content()}


class RunSpec(Frozen):
    """A backbone (stage 1), a classifier on its frozen features (stage 2) and the seed of both."""

    stage1: StageSpec
    stage2: StageSpec
    seed: int = Field(ge=0)

    def backbone_key(self) -> str:
        """Return the store's key of the trained backbone."""
        return backbone_key(self.stage1, self.seed)

    def key(self) -> str:
        """Return the store's key of the classifier, which depends on everything upstream."""
        return digest({"stage2": self.stage2.content(), "seed": self.seed, "backbone": self.backbone_key()})


def backbone_key(stage1: StageSpec, seed: int) -> str:
    """Return the store's key of a backbone."""
    return digest({"stage1": stage1.content(), "seed": seed})


def digest(value: dict[str, Any]) -> str:
    """Return a 32-digit SHA-256 of a JSON value, whatever the order of its fields.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps({"format": FORMAT, **value}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
