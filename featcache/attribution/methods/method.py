"""What every attribution method is."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import yaml
from pydantic import ValidationError

from featcache.attribution.batch import Batch
from featcache.attribution.passes import Passes, Work
from featcache.backbones.backbone import Backbone
from featcache.errors import BadInput, nearest
from featcache.feature import Feature
from featcache.kinds import Kind, Registry
from featcache.probes.heads.module import HeadModule


class Explanation:
    """The maps of one head, and what else a method says of them.

    maps: float32 [T, S, S]. cells: {one of the method's `columns`: T values, NaN where there is none}.
    """

    def __init__(self, maps: torch.Tensor, cells: dict[str, torch.Tensor] | None = None) -> None:
        self.maps, self.cells = maps, cells or {}


class Method(Kind):
    """Base class of attribution methods, which say how much each pixel of an image speaks for a class.

    runs_backbone: whether the method needs the backbone and the images, besides the cached map that every head reads.
    paper: where it was published. columns: of attribution.csv, which it fills beside the scores.
    """

    runs_backbone: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()

    @property
    def label(self) -> str:
        """Its name in tables: its word, and the fields that are not at their defaults, such as rise:masks=500."""
        given = {name: value for name, value in self if value != type(self).model_fields[name].default}
        return ":".join([self.type, *(f"{name}={value}" for name, value in given.items())])

    def misfit(self, backbone: Backbone) -> str | None:
        """Return why the method cannot explain a backbone, such as "has no ReLU", or None if it can."""
        return None

    def explain(
        self, heads: Sequence[HeadModule], feature: Feature, batch: Batch
    ) -> Iterable[torch.Tensor | Explanation]:
        """Compute the maps of a batch for heads that all read one feature, a spatial one, so that they can share work.

        Returns float32 [T, S, S] for each head, in their order: one map for each of the batch's T pairs of an image
        and a class, S = batch.size pixels a side. Positive values speak for the class. A generator holds the maps
        of one head at a time.
        """
        raise NotImplementedError

    @property
    def shared(self) -> Hashable:
        """What methods have in common that share their passes through the backbone: see explain_together."""
        return self

    @classmethod
    def explain_together(
        cls, methods: Sequence[Any], heads: Sequence[HeadModule], feature: Feature, batch: Batch
    ) -> Iterator[tuple[torch.Tensor | Explanation, ...]]:
        """Yield what methods of one `shared` value explain, head by head; see explain."""
        yield from zip(*(method.explain(heads, feature, batch) for method in methods), strict=True)

    def passes(self, work: Work) -> Passes:
        """Return the passes through the backbone that the method takes for some work, where all share what they can."""
        return Passes()

    def passes_alone(self, work: Work) -> Passes:
        """Return the passes where every image is explained on its own for every class and probe, as is usual."""
        return Passes()


def parse_method(registry: Registry[Method], text: str) -> Method:
    """Read a method as users write it: its name, and values of its fields, as in rise:masks=500. Raises BadInput."""
    name, *settings = text.split(":")
    kind = registry.named(name, "--method")
    values: dict[str, Any] = {}
    for setting in settings:
        field, equals, value = setting.partition("=")
        known = [known for known in kind.model_fields if known != "type"]
        if not equals or field not in known:
            raise BadInput(
                f"--method {text}: {setting!r} is no field=value of {name}{nearest(field, known)} "
                f"(fields: {', '.join(known) or 'none'})"
            )
        values[field] = _value(value)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(f"--method {text}: {where}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
