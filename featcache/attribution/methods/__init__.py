"""Attribution methods, each in a file of its own. Other packages add theirs by the entry points of METHODS."""

from featcache.attribution.methods.gradcam import GradCAM
from featcache.attribution.methods.input_x_gradient import InputXGradient
from featcache.attribution.methods.method import Method
from featcache.kinds import Registry

METHODS: Registry[Method] = Registry(Method, "featcache.attribution_methods", "method", [GradCAM, InputXGradient])
DEFAULT_METHODS = (GradCAM.word(),)
