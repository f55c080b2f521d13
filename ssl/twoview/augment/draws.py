"""Random parameters of views, drawn on the host so that a run has the same views on every device."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from twoview.augment.recipe import ViewRecipe

ATTEMPTS = 10  # to draw a box that fits, as in torchvision
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # numbers of the color operations
FIRST_JITTER = 9  # first column of a table that belongs to the color jitter


class Draws(NamedTuple):
    """Random parameters of M views.

    Attributes:
        boxes: int64 ``[M, 4]``: top, left, height and width of the crop in pixels.
        flips: bool ``[M]``, whether the crop is flipped horizontally.
        jittered: bool ``[M]``, whether color jitter is applied.
        orders: int64 ``[M, 4]``, numbers of the color operations in the order in which they are applied.
        factors: float64 ``[M, 4]``: factors of brightness, contrast and saturation, and shift of the hue in turns.
        grays: bool ``[M]``, whether the view is converted to grayscale.
        sigmas: float64 ``[M]``, standard deviation of the blur in pixels, 0 for no blur.
        solarized: bool ``[M]``, whether the view is solarized.
    """

    boxes: np.ndarray
    flips: np.ndarray
    jittered: np.ndarray
    orders: np.ndarray
    factors: np.ndarray
    grays: np.ndarray
    sigmas: np.ndarray
    solarized: np.ndarray

    @classmethod
    def of(cls, recipes: Sequence[ViewRecipe], sizes: np.ndarray, seed: int) -> Self:
        """Draw the parameters of one view of each image by each recipe; the views of the first recipe come first.

        Args:
            recipes: one recipe for each view of an image.
            sizes: int64 ``[N, 2]``, height and width of each image in pixels.
            seed: seed, an integer >= 0.
        """
        generator = np.random.default_rng(seed)
        return cls(*map(np.concatenate, zip(*(_draw(r, sizes, generator) for r in recipes), strict=True)))

    def table(self, images: int, jitter: np.ndarray) -> np.ndarray:
        """Collect what a device needs to know of each view.

        Args:
            images: number of images N; view r is made of image r % N.
            jitter: float64 ``[M, K]``, coefficients of the color jitter.

        Returns:
            float64 ``[M, 9 + K]``: box, -1 for a flip and else 1, standard deviation of the blur, 1 if the view becomes
            gray, 1 if it is solarized, position of the image, coefficients of the color jitter.
        """
        directions, positions = np.where(self.flips, -1, 1), np.arange(len(self.flips)) % images
        columns = np.stack([directions, self.sigmas, self.grays, self.solarized, positions], 1)
        return np.concatenate([self.boxes, columns, jitter], 1)


def _draw(recipe: ViewRecipe, sizes: np.ndarray, generator: np.random.Generator) -> Draws:
    n = len(sizes)

    def happens(probability: float) -> np.ndarray:
        return generator.random(n) < probability

    strengths, (least_sigma, most_sigma) = np.array(recipe.jitter), recipe.blur_sigma
    low, high = np.maximum(1 - strengths, 0), 1 + strengths
    low[HUE], high[HUE] = -strengths[HUE], strengths[HUE]
    return Draws(
        boxes=_boxes(recipe, sizes, generator),
        flips=happens(recipe.flip_p),
        jittered=happens(recipe.jitter_p) & bool(strengths.any()),
        orders=generator.random((n, 4)).argsort(1),
        factors=generator.uniform(low, high, (n, 4)),
        grays=happens(recipe.gray_p),
        sigmas=generator.uniform(least_sigma, most_sigma, n) * happens(recipe.blur_p),
        solarized=happens(recipe.solarize_p),
    )


def _boxes(recipe: ViewRecipe, sizes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw boxes as ``torchvision.transforms.RandomResizedCrop`` does: the first of ten that fits in the image."""
    limits, shape = sizes.T[:, :, None], (len(sizes), ATTEMPTS)
    (smallest, largest), (narrowest, widest) = recipe.crop_scale, recipe.crop_ratio
    area = limits.prod(0) * generator.uniform(smallest, largest, shape)
    ratio = np.exp(generator.uniform(np.log(narrowest), np.log(widest), shape))
    drawn = np.sqrt(np.stack([area / ratio, area * ratio])).round()  # [2, N, ATTEMPTS], heights and widths
    fits = ((drawn > 0) & (drawn <= limits)).all(0)
    first = fits.argmax(1)[None, :, None]
    sides = np.take_along_axis(drawn, first, 2)[..., 0].T
    # If none fits: the largest central box whose aspect ratio is allowed.
    central = np.minimum(sizes, np.stack([sizes[:, 1] / narrowest, sizes[:, 0] * widest], 1).round())
    none = ~fits.any(1)[:, None]
    sides = np.where(none, central, sides)
    corners = np.where(none, (sizes - sides) // 2, generator.random((len(sizes), 2)) * (sizes - sides + 1))
    return np.concatenate([corners, sides], 1).astype(np.int64)
