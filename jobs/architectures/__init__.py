"""Each model of ours in Hugging Face's terms, one file each. Without torch."""

from jobs.architectures.architecture import Architecture
from jobs.architectures.deepseek_v3 import DeepseekV3
from jobs.architectures.glm4_moe import Glm4Moe
from jobs.architectures.llama import Llama
from workers.common.errors import ConfigError
from workers.config import LlamaConfig, LlamaMoeConfig, ModelConfig, MoonlightConfig

ARCHITECTURES: dict[type[ModelConfig], Architecture] = {
    MoonlightConfig: DeepseekV3(),
    LlamaConfig: Llama(),
    LlamaMoeConfig: Glm4Moe(),
}
"""By the class of our settings. A model that is not here trains; it is neither exported nor imported."""


def architecture_of(model: ModelConfig) -> Architecture:
    """Return what Hugging Face's libraries call a model of ours.

    Raises:
        ConfigError: they have none like it, or nobody has said which.
    """
    if (found := ARCHITECTURES.get(type(model))) is None:
        known = ", ".join(kind().name for kind in ARCHITECTURES)
        raise ConfigError(
            f"a {model.name} has no names in Hugging Face's terms, so it is not exported; {known} have "
            "(jobs/architectures, docs/models.md)"
        )
    return found
