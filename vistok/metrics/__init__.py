"""Measuring: reconstructions, sets of images on named features, codebook usage, near copies, and the protocol beside every number."""

from vistok.metrics.codebook import CodebookUsage
from vistok.metrics.evaluate import default_token_counts, evaluate_generation, evaluate_reconstruction, find_near_copies
from vistok.metrics.features import FeatureNet, feature_net, features_of
from vistok.metrics.frechet import (
    FeatureStatistics,
    KernelDistance,
    PrecisionRecall,
    frechet_between,
    frechet_distance,
    kid,
    precision_recall,
)
from vistok.metrics.memorisation import NEAR_COPY_PSNR, NearestImages, nearest_images
from vistok.metrics.protocol import Evaluation, EvaluationProtocol, command_line
from vistok.metrics.reconstruction import as_saved, psnr, ssim
from vistok.metrics.retrieval import nearest_feature_is_right, nearest_is_right
from vistok.metrics.sources import ImagesInMemory, ImageSource

__all__ = [
    "NEAR_COPY_PSNR",
    "CodebookUsage",
    "Evaluation",
    "EvaluationProtocol",
    "FeatureNet",
    "FeatureStatistics",
    "ImageSource",
    "ImagesInMemory",
    "KernelDistance",
    "NearestImages",
    "PrecisionRecall",
    "as_saved",
    "command_line",
    "default_token_counts",
    "evaluate_generation",
    "evaluate_reconstruction",
    "feature_net",
    "features_of",
    "find_near_copies",
    "frechet_between",
    "frechet_distance",
    "kid",
    "nearest_feature_is_right",
    "nearest_images",
    "nearest_is_right",
    "precision_recall",
    "psnr",
    "ssim",
]
