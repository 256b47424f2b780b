"""Fine-tuning as a part of a probe: the backbone below the head is trained too (docs/finetuning.md)."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from featcache.kinds import Registry
from featcache.probes.part import AtLeast0, Count, CountOr0, Part, Positive, Share, Whole


def _shares(scale: tuple[float, ...]) -> tuple[float, ...]:
    if scale and not (len(scale) == 2 and scale[0] <= scale[1] <= 1):
        raise ValueError("is not the lowest and the highest share of the image, as in [0.08, 1]")
    return scale


class Tuning(Part):
    """Base of the ways in which a backbone is trained together with a probe's head."""


class Full(Tuning):
    """All weights that the feature depends on are trained, on augmented images."""

    type: Literal["full"] = "full"
    head_lr: Positive = Field(1.0, description="multiplies the rate of the head")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="multiplies the rate once for every layer below the head (Clark et al., 2020)"
    )
    decay_all: bool = Field(False, description="whether weight decay also acts on norms, biases, tokens and scales")
    norm: Literal["train", "eval", "sync"] = Field(
        "train",
        description="statistics of the backbone's batch norms: of the images in hand (train), of these in all "
        "processes (sync), or the ones that they came with (eval)",
    )
    drop_path: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of images for which the last residual branch is dropped, rising linearly from 0"
    )
    crop_scale: Annotated[tuple[Positive, ...], AfterValidator(_shares)] = Field(
        (), description="lowest and highest share of the image in a crop; [] is the dataset's protocol"
    )
    color_jitter: AtLeast0 = Field(0.0, description="strength of changes of brightness, contrast and saturation")
    randaugment: Annotated[int, Field(ge=0, le=30)] = Field(
        0, description="magnitude of RandAugment (Cubuk et al., 2020); 0 leaves it out"
    )
    randaugment_ops: Count = Field(2, description="operations that RandAugment draws for each image")
    randaugment_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="probability that an operation that was drawn is applied; timm's and mmcls's is 0.5"
    )
    erasing: Share = Field(0.0, description="probability of erasing a part of an image (Zhong et al., 2020)")
    mixup: AtLeast0 = Field(0.0, description="alpha of Mixup (Zhang et al., 2018); 0 leaves it out")
    cutmix: AtLeast0 = Field(
        0.0, description="alpha of CutMix (Yun et al., 2019); with both, each batch draws one of them"
    )
    mixed: Literal["shares", "both"] = Field(
        "shares", description="target of mixed images: both labels by their shares, or both as present"
    )
    repeats: Count = Field(
        1,
        description="how often a mini-batch holds each of its images, augmented anew each time; an epoch then sees one of "
        "so many images (Hoffer et al., 2020)",
    )
    size: CountOr0 = Field(0, description="side of the input in pixels; 0 is what `extract` would take")
    short_side: CountOr0 = Field(0, description="short side before the centre crop in scoring; 0 is the weights' own")
    interpolation: Literal["own", "bilinear", "bicubic"] = Field(
        "own", description="how images are resized, in training too; own is what `extract` would take"
    )
    train_size: CountOr0 = Field(0, description="side of the input in training; 0 is `size`")
    micro_batch: CountOr0 = Field(
        0, description="images that a process runs at a time, of which it adds up the gradients; 0 runs its whole share"
    )
    amp: Literal["none", "bf16", "fp16"] = Field("none", description="mixed precision; fp16 scales the loss")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="decay of a moving average of all weights, which is scored and kept; 0 keeps the weights"
    )

    def conflict(self, spec: Whole) -> str | None:
        """See Part.conflict."""
        if spec.optimizer.full_batch:
            return f"finetune: the optimizer {spec.optimizer.type} sees all images at once, and a backbone cannot"
        if spec.precision not in ("float32", "tf32"):
            return "finetune: write the mixed precision as finetune.amp"
        if spec.views:
            return "finetune: draws new crops in every epoch; leave views out"
        if self.mixed == "both" and not (self.mixup or self.cutmix):
            return "finetune.mixed: both needs mixup or cutmix"
        if self.mixed == "both" and spec.loss.link == "softmax":
            return f"finetune.mixed: both needs a loss with one decision for each class, which {spec.loss.type} is not"
        return None


TUNINGS: Registry[Tuning] = Registry(Tuning, "featcache.tunings", "way of fine-tuning", [Full])
