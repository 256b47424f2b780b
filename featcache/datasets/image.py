"""From an image source of a record to its pixels."""

from PIL import Image, UnidentifiedImageError

from featcache.errors import BadInput


def open_image(source):
    """Decode one image: a PIL image in mode RGB, as torchvision's ImageFolder decodes it.

    source: of a Record. Raises BadInput, naming the source, when it is no readable image.
    """
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadInput(f"unreadable image {source}: {reason}") from None
