"""What of a mixture with a router can be trained."""

from loraplex.errors import ConfigError, MixtureError
from loraplex.routers.mixture import RoutedMixture
from loraplex.routers.router import LinearRouter
from loraplex.training.mixture.config import MixtureTrainConfig


def check_router(mixture: RoutedMixture, config: MixtureTrainConfig) -> None:
    """Raise MixtureError for a router without weights, ConfigError for terms that its gates don't have."""
    if not isinstance(mixture.router, LinearRouter):
        raise MixtureError(
            f"mixture {mixture.name!r} has a router without weights ({type(mixture.config).__name__}), so there is "
            "nothing to train. Make it with LinearRouterConfig or XLoraConfig."
        )
    regularized = [config.load_balance_weight, config.sparsity_weight, config.router.z_loss_weight]
    if any(regularized) and mixture.router.config.activation != "softmax":
        raise ConfigError(
            "load_balance_weight, sparsity_weight and z_loss_weight are defined on a softmax over the experts, but the "
            f"router of mixture {mixture.name!r} has sigmoids. Set the weights to 0."
        )
    if config.layout != "peft":
        raise ConfigError(
            f"layout is {config.layout!r}, which is X-LoRA's, but mixture {mixture.name!r} has a router, which is "
            "written in loraplex's own format. Leave layout out."
        )
