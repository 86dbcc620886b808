"""Telling conformations apart: clusters without labels, and the nearest projection at known poses.

scikit-learn runs on one thread: on several, its sums, and t-SNE with them, differ from run to run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, Isomap
from sklearn.metrics import adjusted_rand_score, confusion_matrix
from threadpoolctl import threadpool_limits

from cryo_lib import checks


def principal_components(images: Any, n_components: int, seed: int = 0) -> np.ndarray:
    """Return the first principal components of images `(n, h, w)`: `(n, n_components)`, or fewer where n is smaller."""
    images = checks.as_images("images", images)
    n_components = min(checks.integer("n_components", n_components, low=1), len(images), images[0].size)
    with threadpool_limits(1):
        return PCA(n_components, random_state=seed).fit_transform(images.reshape(len(images), -1))


def cluster(points: np.ndarray, n_clusters: int, seed: int = 0) -> np.ndarray:
    """Return k-means labels `(n,)` of points `(n, d)`, best of ten starts; ValueError for more clusters than points."""
    with threadpool_limits(1):
        return KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(points)


def embed(points: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Return maps of points `(n, d)` to the plane, `(n, 2)` each: {"t-SNE": ..., "Isomap": ...}.

    Perplexity 30 and 10 neighbours, or a third of n where that is less. Where the graph of neighbours falls apart, as
    that of perfect clusters does, Isomap joins its parts by their shortest links.
    """
    perplexity, neighbours = (min(at_most, len(points) // 3) for at_most in (30, 10))
    methods = {
        "t-SNE": TSNE(perplexity=perplexity, init="pca", random_state=seed),
        "Isomap": Isomap(n_neighbors=neighbours, n_components=2, eigen_solver="dense"),  # ARPACK starts at random
    }
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of connected components|Changing the sparsity structure")
        return {name: method.fit_transform(points) for name, method in methods.items()}


def agreement(truth: Any, labels: Any) -> dict[str, float]:
    """Return how clusters agree with the truth: `{"ari": ..., "accuracy": ...}`.

    The adjusted Rand index (1 for the same partition, 0 expected by chance; Hubert & Arabie 1985), and the share of
    items that the best one-to-one matching of clusters to classes gets right.

    Parameters
    ----------
    truth, labels : `(n,)` integers; their names do not matter. ValueError for different lengths.
    """
    classes, truth = np.unique(truth, return_inverse=True)
    clusters, labels = np.unique(labels, return_inverse=True)
    counts = confusion_matrix(truth, labels, labels=np.arange(max(len(classes), len(clusters))))
    matched = counts[linear_sum_assignment(counts, maximize=True)].sum()
    return {"ari": float(adjusted_rand_score(truth, labels)), "accuracy": float(matched / counts.sum())}


def nearest(images: Any, templates: Sequence[Any]) -> np.ndarray:
    """Return for each image the index of the template nearest to it, `(n,)` int64, least squares over gain and offset.

    The nearest is that of the highest correlation; for white noise, the most likely one.

    Parameters
    ----------
    images : `(n, h, w)`. templates : each `(n, h, w)`, the projections of one conformation at the images' poses.

    Raises
    ------
    TypeError, ValueError : shapes that differ, NaN.
    """
    images = _standardised(checks.as_images("images", images))
    correlations = []
    for number, template in enumerate(templates):
        template = checks.as_images(f"templates[{number}]", template)
        checks.same_shape("images", images, f"templates[{number}]", template)
        correlations.append((images * _standardised(template)).sum(axis=(1, 2)))
    return np.argmax(correlations, axis=0)


def _standardised(images: np.ndarray) -> np.ndarray:
    centred = images - images.mean(axis=(1, 2), keepdims=True)
    return centred / np.maximum(np.sqrt(np.square(centred).sum(axis=(1, 2), keepdims=True)), 1e-12)
