"""Converts Hugging Face's image processors to our preprocessing.

A setting that is not supported is an error that names the field. An absent field has the default of
transformers 5.
"""

from collections.abc import Mapping
from typing import Any

from handler.errors import UserError
from handler.image_preprocess import PreprocessConfig

# The supported filters by Pillow's numbers.
RESAMPLING = {2: "bilinear", 3: "bicubic"}
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
CLIP_MEAN_STD = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
# Defaults of transformers: size, filter, crop size, (mean, std).
DEFAULTS: dict[str, tuple[Any, int, Any, tuple[list[float], list[float]]]] = {
    "ViT": (224, 2, None, HALF),
    "DeiT": (256, 3, 224, HALF),
    "Blip": (384, 3, None, CLIP_MEAN_STD),
    "CLIP": ({"shortest_edge": 224}, 3, 224, CLIP_MEAN_STD),
    "Bit": ({"shortest_edge": 224}, 3, 224, CLIP_MEAN_STD),  # DINOv2's
}
ENDINGS = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
PROCESSORS = {f"{name}{ending}": name for name in DEFAULTS for ending in ENDINGS}


def import_preprocessing(
    processor: Mapping[str, Any], image_size: int | None = None
) -> PreprocessConfig:
    """Our preprocessing from a `preprocessor_config.json` without null values, for an encoder of
    `image_size` pixels (None: of any size). Raises UserError naming a field that is not supported.
    """
    fields = _with_defaults(processor)
    if not fields.get("do_resize", True):
        raise UserError("field 'do_resize' is false; it must be true")
    if fields.get("do_pad"):
        raise UserError("field 'do_pad' is true; it is not supported")
    if type(fields["resample"]) is not int or fields["resample"] not in RESAMPLING:
        raise UserError(
            f"field 'resample' is {fields['resample']!r}; only 2 (bilinear) and 3 (bicubic) "
            "are supported"
        )
    resized, fit = _size(fields["size"], "size")
    cropped = resized
    if fields["do_center_crop"]:
        cropped, crop_fit = _size(fields["crop_size"], "crop_size")
        if crop_fit != "squash" or cropped > resized:
            raise UserError(
                f"field 'crop_size' is {fields['crop_size']!r}; only a square within 'size' "
                "is supported"
            )
    elif fit == "crop":
        raise UserError(f"field 'size' is {fields['size']!r}, but 'do_center_crop' is not true")
    if image_size is not None and cropped != image_size:
        raise UserError(
            f"field '{'crop_size' if fields['do_center_crop'] else 'size'}' gives photos of "
            f"{cropped} pixels, but config.json's field 'encoder.image_size' is {image_size}"
        )
    mean, std = [0.0] * 3, [1.0] * 3
    if fields.get("do_normalize", True):
        mean, std = (_three(fields, name) for name in ("image_mean", "image_std"))
    # Ours always rescales by 1 / 255; mean and std compensate for any other factor.
    factor = fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1.0
    if type(factor) not in (int, float) or factor <= 0:
        raise UserError(f"field 'rescale_factor' is {factor!r}; give a number above 0")
    scale = 255 * factor
    return PreprocessConfig(
        image_size=cropped,
        mean=tuple(value / scale for value in mean),  # type: ignore[arg-type]
        std=tuple(value / scale for value in std),  # type: ignore[arg-type]
        resize=fit,  # type: ignore[arg-type]
        resize_to=resized if resized != cropped else None,
        interpolation=RESAMPLING[fields["resample"]],  # type: ignore[arg-type]
    )


def _with_defaults(processor: Mapping[str, Any]) -> dict[str, Any]:
    kind = processor.get("image_processor_type", processor.get("feature_extractor_type"))
    if str(kind) not in PROCESSORS:
        raise UserError(
            f"field 'image_processor_type' is {kind!r}; only those of {', '.join(DEFAULTS)} are "
            "supported"
        )
    size, resample, crop, (mean, std) = DEFAULTS[PROCESSORS[str(kind)]]
    defaults = {"size": size, "resample": resample, "image_mean": mean, "image_std": std}
    fields = {**defaults, "do_center_crop": crop is not None, "crop_size": crop, **processor}
    if isinstance(size, dict) and type(fields["size"]) is int:
        fields["size"] = {"shortest_edge": fields["size"]}  # the form in old files
    return fields


def _size(value: Any, name: str) -> tuple[int, str]:
    """A size in pixels, and `squash` for a square or `crop` for the short side of a photo."""
    sides, fit = value, "squash"
    if isinstance(value, dict):
        if set(value) == {"shortest_edge"}:
            sides, fit = value["shortest_edge"], "crop"
        elif set(value) == {"height", "width"}:
            sides = [value["height"], value["width"]]
    if isinstance(sides, list) and len(sides) == 2 and sides[0] == sides[1]:
        sides = sides[0]
    if type(sides) is not int or sides < 1:
        raise UserError(
            f"field {name!r} is {value!r}; only a square or a shortest_edge is supported"
        )
    return sides, fit


def _three(processor: Mapping[str, Any], name: str) -> list[float]:
    value = processor[name]
    value = value if isinstance(value, list) else [value] * 3
    if len(value) != 3 or any(type(v) not in (int, float) for v in value):
        raise UserError(f"field {name!r} is {value!r}; give three numbers")
    return value
