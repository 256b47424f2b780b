"""Attribution methods, each in a file of its own. Other packages add theirs by the entry points of METHODS."""

from featcache.attribution.methods.attention_rollout import AttentionRollout
from featcache.attribution.methods.attnlrp import AttnLRP
from featcache.attribution.methods.bcos import BcosContributions
from featcache.attribution.methods.cached_occlusion import CachedOcclusion
from featcache.attribution.methods.deeplift import DeepLIFT
from featcache.attribution.methods.gradcam import GradCAM
from featcache.attribution.methods.gradcampp import GradCAMPlusPlus
from featcache.attribution.methods.gradient import Gradient
from featcache.attribution.methods.guided_backprop import GuidedBackprop
from featcache.attribution.methods.input_x_gradient import InputXGradient
from featcache.attribution.methods.intgrad import IntegratedGradients
from featcache.attribution.methods.kernel_shap import KernelSHAP
from featcache.attribution.methods.layercam import LayerCAM
from featcache.attribution.methods.lime import LIME
from featcache.attribution.methods.lrp import LRP
from featcache.attribution.methods.method import Method
from featcache.attribution.methods.occlusion import Occlusion
from featcache.attribution.methods.position_logits import PositionLogits
from featcache.attribution.methods.rise import RISE
from featcache.attribution.methods.scorecam import ScoreCAM
from featcache.attribution.methods.smoothgrad import SmoothGrad
from featcache.kinds import Registry

METHODS: Registry[Method] = Registry(
    Method,
    "featcache.attribution_methods",
    "method",
    [
        GradCAM, GradCAMPlusPlus, LayerCAM, PositionLogits, Gradient, InputXGradient, GuidedBackprop, SmoothGrad,
        IntegratedGradients, DeepLIFT, LRP, AttnLRP, AttentionRollout, BcosContributions, CachedOcclusion, Occlusion, RISE, LIME,
        KernelSHAP, ScoreCAM,
    ],
)  # fmt: skip
DEFAULT_METHODS = (GradCAM.word(),)
