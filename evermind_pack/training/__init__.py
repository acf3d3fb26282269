"""Trainers, run folders that can be resumed, and text corpora.

Nothing here prints: progress goes to an `on_step` callback.
"""

from __future__ import annotations

from ..interrupt import stop_on_interrupt
from .atome_trainer import AtomeTrainer
from .corpus import (
    LIBRARY_TABLES,
    SKIPPED_FOLDERS,
    Corpus,
    build_corpus,
    read_documents,
    standard_library,
    stream_windows,
)
from .language import LanguagePlan, language_plan, resume_language_model, train_language_model
from .limbic_trainer import LimbicBatch, LimbicTrainer, LimbicTrainerOptions
from .lm_trainer import LmBatch, LmTrainer, LmTrainerOptions
from .loop import DivergedError, TrainingResult, run_training
from .moe_trainer import MoeBatch, MoeEpoch, MoeTrainer, MoeTrainerOptions
from .optimizer import OptimizerOptions, learning_rate
from .peer_precision import PeerLossScaler, PeerMixedTrainer
from .presets import LanguagePreset, atome_bytes, python_demo, synapse_demo
from .run_folder import RunFolder
from .tokitai_trainer import (
    RULE_CLASSES,
    TokitaiBatch,
    TokitaiTrainer,
    TokitaiTrainerOptions,
    rule_batch,
)
from .trainer import StepReport, Trainer

__all__ = [
    "LIBRARY_TABLES",
    "RULE_CLASSES",
    "SKIPPED_FOLDERS",
    "AtomeTrainer",
    "Corpus",
    "DivergedError",
    "LanguagePlan",
    "LanguagePreset",
    "LimbicBatch",
    "LimbicTrainer",
    "LimbicTrainerOptions",
    "LmBatch",
    "LmTrainer",
    "LmTrainerOptions",
    "MoeBatch",
    "MoeEpoch",
    "MoeTrainer",
    "MoeTrainerOptions",
    "OptimizerOptions",
    "PeerLossScaler",
    "PeerMixedTrainer",
    "RunFolder",
    "StepReport",
    "TokitaiBatch",
    "TokitaiTrainer",
    "TokitaiTrainerOptions",
    "Trainer",
    "TrainingResult",
    "atome_bytes",
    "build_corpus",
    "language_plan",
    "learning_rate",
    "python_demo",
    "read_documents",
    "resume_language_model",
    "rule_batch",
    "run_training",
    "standard_library",
    "stop_on_interrupt",
    "stream_windows",
    "synapse_demo",
    "train_language_model",
]
