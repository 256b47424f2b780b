"""From an image source of a record to its pixels."""

from PIL import Image, UnidentifiedImageError

from featcache.errors import BadInput


def open_image(source, reduce=1):
    """Decode one image: a PIL image in mode RGB, as torchvision's ImageFolder decodes it.

    source: of a Record. reduce: 2, 4 or 8 decodes a JPEG at that part of its sides, rounded up, in the
    frequency domain, which is quicker and not exact; other formats are decoded whole.
    Raises BadInput, naming the source, when it is no readable image.
    """
    try:
        with Image.open(source) as image:
            if reduce > 1:
                image.draft("RGB", (image.width // reduce, image.height // reduce))
            # What is RGB already would be copied by convert: a third of the time for large images.
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadInput(f"unreadable image {source}: {reason}") from None
