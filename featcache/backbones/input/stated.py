"""What a checkpoint says itself about the input it was trained for: files beside the weights, and records inside.

Beside the weights: timm's and Hugging Face's config.json, preprocessor_config.json, the same for videos, and
open_clip_config.json. Inside: the configuration of mmpretrain and related packages, and what `featcache export` wrote.
"""

import ast
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors

from featcache.backbones.architecture import Fields, Origins
from featcache.backbones.input.preprocessing import INTERPOLATION

CONFIGS = ("config.json", "preprocessor_config.json", "video_preprocessor_config.json", "open_clip_config.json")
# A configuration is a few kilobytes; a file larger than this is none.
MOST_BYTES = 4 << 20
# PIL's numbers, in which Hugging Face writes them.
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

# Fields of Architecture, and lines for people on what featcache does differently.
Stated = tuple[Fields, list[str]]


def stated_input(path: str | PathLike[str], content: Any) -> tuple[Fields, Origins, list[str]]:
    """Collect what a checkpoint says about its input: (fields of Architecture, where each is from, notices).

    path: checkpoint file or folder. content: as read_checkpoint returns it. Records inside the checkpoint win over
    files beside it. Nothing raises: what cannot be read is a notice, a line for people.
    """
    fields: Fields = {}
    origins: Origins = {}
    notices: list[str] = []
    for where, read in _sources(Path(path), content):
        try:
            stated, lines = read()
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError) as error:
            notices.append(f"{where} is not used: {str(error)[:100] or type(error).__name__}")
            continue
        notices += [f"{where} {line}" for line in lines]
        if stated.get("interpolation") not in (None, *INTERPOLATION):
            notices.append(f"{where} says interpolation {stated.pop('interpolation')}, which is not known here")
        other = [f for f in stated if f in fields and fields[f] != stated[f]]
        if other:
            notices.append(f"{where} says another {' and '.join(other)}, which is not used")
        new = {f: value for f, value in stated.items() if f not in fields}
        fields |= new
        origins |= dict.fromkeys(new, f"from {where}")
    return fields, origins, notices


def _sources(path: Path, content: Any) -> Iterator[tuple[str, Callable[[], Stated]]]:
    """Yield (its name for people, function that reads it) of every place that may state the input."""
    meta = content.get("meta") if isinstance(content, dict) else None
    if isinstance(meta, dict):
        yield "the checkpoint's meta", partial(_from_meta, meta)
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors"))[:1]:
        yield f"the metadata of {file.name}", partial(_from_safetensors, file)
    folder = path if path.is_dir() else path.parent
    for name in CONFIGS:
        if (folder / name).is_file():
            yield name, partial(_from_json, folder / name)


def _from_safetensors(path: Path) -> Stated:
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("featcache")
    except safetensors.SafetensorError:
        return {}, []
    return ({}, []) if text is None else _from_meta(json.loads(text))


def _from_meta(meta: dict[str, Any]) -> Stated:
    """Read mmengine's or mmcv's meta, which holds a configuration as Python text; or ours."""
    if isinstance(meta.get("preprocessing"), dict):
        return _ours(meta["preprocessing"])
    text = meta.get("cfg", meta.get("config"))
    if not isinstance(text, str):
        return {}, []
    if len(text) > MOST_BYTES:
        raise ValueError("its configuration is too large")
    try:
        tree = ast.parse(text)
    except SyntaxError:
        raise ValueError("its configuration is not Python") from None
    named, normalisation = _normalisation(tree)
    if not normalisation:
        return {}, []
    # OpenMixup normalises pixels in 0..1, the others in 0..255.
    unit = 255 if max((*normalisation["mean"], *normalisation["std"])) > 1 else 1
    mean, std = (_three([v / unit for v in normalisation[k]], k) for k in ("mean", "std"))
    # mmcv reads images as blue, green, red, and a data_preprocessor leaves them so unless it is told otherwise; mean
    # and std are in the order that the network sees.
    bgr = not normalisation.get("to_rgb", normalisation.get("bgr_to_rgb", not named))
    return ({"mean": mean[::-1], "std": std[::-1], "bgr": True} if bgr else {"mean": mean, "std": std}), []


def _normalisation(tree: ast.AST) -> tuple[bool, dict[str, Any]]:
    """Find the literals beside mean and std in a configuration: a data_preprocessor's, else the first.

    Returns (whether they are a data_preprocessor's, {name: literal}), {} if there is none.
    """
    candidates: list[tuple[bool, dict[str, Any]]] = []
    for node in ast.walk(tree):
        names = [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]
        assigned: Any = node
        items = _items(assigned.value if names or isinstance(node, ast.keyword) else node)
        if {"mean", "std"} <= items.keys():
            named = "data_preprocessor" in [*names, getattr(node, "arg", None)]
            candidates.append((named, items))
    return max(candidates, key=lambda pair: pair[0], default=(False, {}))


def _items(node: ast.AST) -> dict[Any, Any]:
    """Return {name: literal} of dict(name=literal, ...) or {"name": literal, ...}, without values that are no literal."""
    pairs: list[tuple[Any, ast.expr]] = []
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict":
        pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
    elif isinstance(node, ast.Dict):
        pairs = [(key.value, v) for key, v in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant)]
    items = {}
    for name, value in pairs:
        try:
            items[name] = ast.literal_eval(value)
        except ValueError:
            continue
    return items


def _ours(preprocessing: dict[str, Any]) -> Stated:
    fields: Fields = {"size": _side(preprocessing["size"]), "interpolation": str(preprocessing["interpolation"])}
    if preprocessing.get("resize") == "crop":
        fields["short_side"] = _side(preprocessing["short_side"])
    if preprocessing.get("bgr"):
        fields["bgr"] = True
    return fields | {k: _three(preprocessing[k], k) for k in ("mean", "std")}, []


def _from_json(path: Path) -> Stated:
    if path.stat().st_size > MOST_BYTES:
        raise ValueError("it is too large for a configuration")
    data = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(data, dict):
        return {}, []
    if isinstance(data.get("preprocess_cfg"), dict):
        return _open_clip(data)
    if "image_mean" in data or "image_std" in data or data.get("do_normalize") is False:
        return _hugging_face(data)
    # Older files of timm's hub hold the configuration at the top.
    config = data.get("pretrained_cfg", data)
    return timm_input(config) if isinstance(config, dict) and "mean" in config else ({}, [])


def timm_input(config: dict[str, Any]) -> Stated:
    """Turn timm's pretrained_cfg, or data config, into fields of Architecture. Returns (fields, notices)."""
    fields = _common(config)
    notices: list[str] = []
    sides = tuple(config.get("input_size") or ())[1:]
    if len(set(sides)) == 1:
        size = fields["size"] = _side(sides[0])
        short = math.floor(size / (config.get("crop_pct") or 0.875))
        fields |= {"resize": "crop", "short_side": short}
        if config.get("crop_mode") == "squash":
            if short == size:
                fields["resize"] = "squash"
            else:
                notices.append(f"squashes to {short} pixels before the crop; here the short side goes there")
        elif config.get("crop_mode") == "border" or short < size:
            fields["short_side"] = size
            notices.append("pads images at their borders; here they are cropped")
    return fields, notices


def _open_clip(data: dict[str, Any]) -> Stated:
    config = data["preprocess_cfg"]
    fields = _common(config)
    notices: list[str] = []
    size = config.get("size") or data.get("model_cfg", {}).get("vision_cfg", {}).get("image_size")
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    if isinstance(size, int):
        mode = config.get("resize_mode") or "shortest"
        fields |= {"size": _side(size), "short_side": size, "resize": "squash" if mode == "squash" else "crop"}
        if mode == "longest":
            notices.append("pads images at their borders; here they are cropped")
    return fields, notices


def _hugging_face(data: dict[str, Any]) -> Stated:
    fields: Fields = {}
    notices: list[str] = []
    if data.get("do_normalize") is False:
        fields |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    else:
        # Mean and std are in the unit that the file rescales pixels to; here pixels are in 0..1.
        unit = 255 * (1 if data.get("do_rescale") is False else (data.get("rescale_factor") or 1 / 255))
        unit = 1 if math.isclose(unit, 1) else unit
        means = {k: data[f"image_{k}"] for k in ("mean", "std") if f"image_{k}" in data}
        fields |= {k: _three([v / unit for v in values], k) for k, values in means.items()}
    if "resample" in data:
        fields["interpolation"] = RESAMPLE.get(data["resample"], str(data["resample"]))
    if data.get("do_resize") is False or "size" not in data:
        return fields, notices
    if isinstance(data["size"], dict) and data["size"].keys() == {"longest_edge"}:
        notices.append("pads images at their borders; here they are squashed")
        return fields | {"size": _side(data["size"]["longest_edge"]), "resize": "squash"}, notices
    resized, both = _edge(data["size"])
    crop, _ = _edge(data["crop_size"]) if data.get("do_center_crop") and "crop_size" in data else (None, None)
    if crop is not None:
        fields |= {"size": crop, "short_side": max(resized, crop), "resize": "crop"}
        if both and resized != crop:
            notices.append(f"squashes to {resized} pixels before the crop; here the short side goes there")
    elif data.get("crop_pct"):
        # ConvNeXt's processor crops inputs smaller than 384 and squashes larger ones.
        short = int(resized / data["crop_pct"]) if resized < 384 else resized
        fields |= {"size": resized, "short_side": short, "resize": "crop" if resized < 384 else "squash"}
    elif both or isinstance(data["size"], int):
        fields |= {"size": resized, "short_side": resized, "resize": "squash"}
    return fields, notices


def _edge(size: Any) -> tuple[int, bool]:
    """Return (side, whether both sides are brought to it) from one of Hugging Face's sizes."""
    if isinstance(size, dict) and "shortest_edge" not in size:
        if size["height"] != size["width"]:
            raise ValueError(f"its size {size['height']}x{size['width']} is no square")
        return _side(size["height"]), True
    return _side(size["shortest_edge"] if isinstance(size, dict) else size), False


def _common(config: dict[str, Any]) -> Fields:
    """Return mean, std and interpolation, as timm and OpenCLIP name them."""
    fields: Fields = {k: _three(config[k], k) for k in ("mean", "std") if config.get(k) is not None}
    if config.get("interpolation"):
        fields["interpolation"] = str(config["interpolation"])
    return fields


def _three(values: Any, name: str) -> tuple[float, ...]:
    values = tuple(float(v) for v in values)
    if len(values) != 3 or not all(0 <= v <= 1 for v in values) or (name == "std" and min(values) == 0):
        raise ValueError(f"its {name} is not three numbers in 0..1")
    return values


def _side(value: Any) -> int:
    if not isinstance(value, int) or not 0 < value < 1 << 14:
        raise ValueError(f"its size is {value!r}, not a number of pixels")
    return value
