"""Subnetworks: which coordinates of the parameters a posterior is over, chosen by a mask.

A mask is selected once, from the model and where needed from data; its `indices` are coordinates of the flat vector of
all parameters that require a gradient::

    mask = LargestMagnitudeSubnetMask(model, n_params_subnet=100)
    mask.select()
    la = Laplace(model, "classification", mask, "full")

Names and arguments follow laplace-torch 0.3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from curvlin._check import positive_integer
from curvlin_nn import likelihoods
from curvlin_nn.batches import Labelled, batches
from curvlin_nn.capture import last_layer
from curvlin_nn.capture.state import device_of
from curvlin_nn.errors import DataError, NotSelectedError, UnsupportedError
from curvlin_nn.likelihoods import Likelihood
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.subnetwork_space import Subnetwork
from curvlin_nn.swag import diagonal_swag_variance

if TYPE_CHECKING:
    from curvlin_nn.laplace import Laplace

__all__ = [
    "LargestMagnitudeSubnetMask",
    "LargestVarianceDiagLaplaceSubnetMask",
    "LargestVarianceSWAGSubnetMask",
    "LastLayerSubnetMask",
    "ModuleNameSubnetMask",
    "ParamNameSubnetMask",
    "RandomSubnetMask",
    "ScoreBasedSubnetMask",
    "SubnetMask",
    "Subnetwork",
]


class SubnetMask(ABC):
    """A choice of coordinates, made once.

    Args:
        model: any module; it is only read.

    Raises:
        UnsupportedError: if it has no parameter that requires a gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = ParameterSpace.of(model, "all")
        self._indices: Tensor | None = None

    @property
    def parameter_vector(self) -> Float[Tensor, " P"]:
        """The parameters that require a gradient, flat."""
        return self.parameters.flatten(self.parameters.tensors(self.model))

    @property
    def indices(self) -> Int[Tensor, " k"]:
        """The chosen coordinates, increasing.

        Raises:
            NotSelectedError: before `select`.
        """
        if self._indices is None:
            raise NotSelectedError("the subnetwork is not selected; call select(train_loader) first")
        return self._indices

    @property
    def n_params_subnet(self) -> int:
        """k, the number of chosen coordinates."""
        return len(self.indices)

    def select(
        self, train_loader: Iterable[Any] | None = None, *, dict_key_y: str | None = None
    ) -> Int[Tensor, " k"]:
        """Choose the coordinates.

        Args:
            train_loader: batches ``(inputs, targets)``, or mappings with targets under `dict_key_y`, for masks
                that look at data.
            dict_key_y: the name of the targets in loaders that yield mappings; None takes that of the `Laplace` object
                that a mask asks, and ``"labels"`` for one that asks none.

        Returns:
            `indices`.

        Raises:
            UnsupportedError: if they are chosen already, or the mask cannot be made.
            DataError: if data are needed, and there are none.
        """
        if self._indices is not None:
            raise UnsupportedError(
                "the subnetwork is selected already, expected one call of select; make a new mask"
            )
        if train_loader is not None and dict_key_y is not None:
            train_loader = Labelled(train_loader, dict_key_y)
        self._indices = self.convert_subnet_mask_to_indices(self.get_subnet_mask(train_loader))
        return self._indices

    def convert_subnet_mask_to_indices(self, subnet_mask: Bool[Tensor, " P"]) -> Int[Tensor, " k"]:
        """The coordinates where a mask of ones and zeros, boolean or integer, has a one.

        Raises:
            UnsupportedError: if it is none, or has no one.
        """
        size = self.parameters.size
        if (
            not isinstance(subnet_mask, Tensor)
            or subnet_mask.is_floating_point()
            or subnet_mask.shape != (size,)
        ):
            found = (
                f"{tuple(subnet_mask.shape)} of {subnet_mask.dtype}"
                if isinstance(subnet_mask, Tensor)
                else subnet_mask
            )
            raise UnsupportedError(
                f"a subnetwork mask must be a boolean vector of {size} entries, found {found}"
            )
        if not bool(((subnet_mask == 0) | (subnet_mask == 1)).all()) or not bool(subnet_mask.any()):
            raise UnsupportedError("a subnetwork mask must hold ones and zeros, at least one of the former")
        return subnet_mask.cpu().nonzero().squeeze(1)

    @abstractmethod
    def get_subnet_mask(self, train_loader: Iterable[Any] | None) -> Bool[Tensor, " P"]:
        """Whether each coordinate is chosen."""


class ScoreBasedSubnetMask(SubnetMask):
    """The coordinates with the largest scores; of equal ones the first.

    Args:
        model: any module.
        n_params_subnet: k, how many.

    Raises:
        UnsupportedError: if the model has fewer.
    """

    def __init__(self, model: nn.Module, n_params_subnet: int) -> None:
        super().__init__(model)
        self._size = positive_integer("n_params_subnet", n_params_subnet)
        if self._size > self.parameters.size:
            raise UnsupportedError(
                f"n_params_subnet must be at most {self.parameters.size}, the number of parameters, found {self._size}"
            )

    @property
    def n_params_subnet(self) -> int:
        """k, the number of coordinates that are or will be chosen."""
        return self._size

    @abstractmethod
    def compute_param_scores(self, train_loader: Iterable[Any] | None) -> Float[Tensor, " P"]:
        """The score of each coordinate."""

    def get_subnet_mask(self, train_loader: Iterable[Any] | None) -> Bool[Tensor, " P"]:
        """See `SubnetMask.get_subnet_mask`."""
        scores = self.compute_param_scores(train_loader)
        if scores.shape != (self.parameters.size,) or bool(scores.isnan().any()):
            raise UnsupportedError(
                f"scores must be {self.parameters.size} numbers, one for each parameter, found shape "
                f"{tuple(scores.shape)}{' with NaN' if bool(scores.isnan().any()) else ''}"
            )
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[scores.argsort(descending=True, stable=True)[: self._size]] = True
        return mask


class RandomSubnetMask(ScoreBasedSubnetMask):
    """Coordinates drawn uniformly without replacement.

    Args:
        model: any module.
        n_params_subnet: how many.
        generator: source of randomness; None is torch's default generator.
    """

    def __init__(
        self, model: nn.Module, n_params_subnet: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(model, n_params_subnet)
        self._generator = generator

    def compute_param_scores(self, train_loader: Iterable[Any] | None) -> Float[Tensor, " P"]:
        """See `ScoreBasedSubnetMask.compute_param_scores`: uniform numbers."""
        return torch.rand(self.parameters.size, dtype=torch.float64, generator=self._generator)


class LargestMagnitudeSubnetMask(ScoreBasedSubnetMask):
    """The parameters of the largest absolute value."""

    def compute_param_scores(self, train_loader: Iterable[Any] | None) -> Float[Tensor, " P"]:
        """See `ScoreBasedSubnetMask.compute_param_scores`."""
        return self.parameter_vector.abs()


class LargestVarianceDiagLaplaceSubnetMask(ScoreBasedSubnetMask):
    """The parameters of the largest variance under a diagonal Laplace approximation (Daxberger et al., 2021).

    Args:
        model: any module.
        n_params_subnet: how many.
        diag_laplace_model: ``Laplace(model, likelihood, "all", "diag")``; `select` fits it.

    Raises:
        UnsupportedError: if that is none over all parameters.
    """

    def __init__(self, model: nn.Module, n_params_subnet: int, diag_laplace_model: Laplace) -> None:
        super().__init__(model, n_params_subnet)
        if getattr(diag_laplace_model, "subset_of_weights", None) != "all":
            found = getattr(diag_laplace_model, "subset_of_weights", type(diag_laplace_model).__name__)
            raise UnsupportedError(
                f"diag_laplace_model must be Laplace(model, likelihood, 'all', 'diag'), found subset {found!r}"
            )
        self.diag_laplace_model = diag_laplace_model

    def compute_param_scores(self, train_loader: Iterable[Any] | None) -> Float[Tensor, " P"]:
        """See `ScoreBasedSubnetMask.compute_param_scores`: marginal variances; no Jacobian is formed."""
        la = self.diag_laplace_model.fit(_needed(train_loader))
        return la.posterior_precision.inverse_diagonal()


class LargestVarianceSWAGSubnetMask(ScoreBasedSubnetMask):
    """The parameters that vary most along a run of SGD (diagonal SWAG; Maddox et al., 2019), of a copy of the model.

    Args:
        model: any module; it stays as it is.
        n_params_subnet: how many.
        likelihood: whose negative log-likelihood is minimised.
        swag_n_snapshots: how many parameter vectors the variance is of.
        swag_snapshot_freq: epochs between them.
        swag_lr: the learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        n_params_subnet: int,
        likelihood: str | nn.Module | Likelihood = "classification",
        swag_n_snapshots: int = 40,
        swag_snapshot_freq: int = 1,
        swag_lr: float = 0.01,
    ) -> None:
        super().__init__(model, n_params_subnet)
        self.likelihood = likelihoods.resolve(likelihood)
        self.swag_n_snapshots = positive_integer("swag_n_snapshots", swag_n_snapshots)
        self.swag_snapshot_freq = positive_integer("swag_snapshot_freq", swag_snapshot_freq)
        self.swag_lr = swag_lr

    def compute_param_scores(self, train_loader: Iterable[Any] | None) -> Float[Tensor, " P"]:
        """See `ScoreBasedSubnetMask.compute_param_scores`: variances of the snapshots."""
        return diagonal_swag_variance(
            self.model,
            self.likelihood,
            _needed(train_loader),
            n_snapshots=self.swag_n_snapshots,
            snapshot_every=self.swag_snapshot_freq,
            lr=self.swag_lr,
        )


class ParamNameSubnetMask(SubnetMask):
    """All entries of some parameters.

    Args:
        model: any module.
        parameter_names: as in ``model.named_parameters()``.
    """

    def __init__(self, model: nn.Module, parameter_names: Sequence[str]) -> None:
        super().__init__(model)
        self._names = list(parameter_names)

    def get_subnet_mask(self, train_loader: Iterable[Any] | None) -> Bool[Tensor, " P"]:
        """See `SubnetMask.get_subnet_mask`."""
        unknown = [name for name in self._names if name not in self.parameters.names]
        if unknown or not self._names:
            raise UnsupportedError(
                f"parameter_names must name parameters of the model that require a gradient, found {unknown}"
            )
        return _mask_of(self.parameters, self._names)


class ModuleNameSubnetMask(SubnetMask):
    """All parameters of some modules that have no modules below them.

    Args:
        model: any module.
        module_names: as in ``model.named_modules()``.
    """

    def __init__(self, model: nn.Module, module_names: Sequence[str]) -> None:
        super().__init__(model)
        self._names = list(module_names)

    def get_subnet_mask(self, train_loader: Iterable[Any] | None) -> Bool[Tensor, " P"]:
        """See `SubnetMask.get_subnet_mask`."""
        modules = dict(self.model.named_modules())
        for name in self._names:
            if name not in modules or any(True for _ in modules[name].children()):
                found = "has modules below it" if name in modules else "is no module of the model"
                raise UnsupportedError(
                    f"module_names must name modules without others below them, found {name!r}, which {found}"
                )
        owned = [name for module in self._names for name in self.parameters.modules.get(module, ())]
        if not owned:
            raise UnsupportedError(
                f"module_names must name modules with parameters that require a gradient, found {self._names}"
            )
        return _mask_of(self.parameters, owned)


class LastLayerSubnetMask(SubnetMask):
    """All parameters of the last layer.

    Args:
        model: any module.
        last_layer_name: the module; None finds it by running the model on the first batch.
    """

    def __init__(self, model: nn.Module, last_layer_name: str | None = None) -> None:
        super().__init__(model)
        self._name = last_layer_name

    def get_subnet_mask(self, train_loader: Iterable[Any] | None) -> Bool[Tensor, " P"]:
        """See `SubnetMask.get_subnet_mask`."""
        if self._name is not None:
            return ModuleNameSubnetMask(self.model, [self._name]).get_subnet_mask(None)
        batch = next(batches(_needed(train_loader), device_of(self.model)), None)
        if batch is None:
            raise DataError("the loader yielded no batch, expected at least one (inputs, targets)")
        return _mask_of(self.parameters, last_layer(self.model, batch[0]).names)


def _mask_of(space: ParameterSpace, names: Iterable[str]) -> Bool[Tensor, " P"]:
    mask = torch.zeros(space.size, dtype=torch.bool)
    for name in names:
        if name not in space.spans:
            raise UnsupportedError(
                f"parameter {name!r} does not require a gradient, expected one that does; thaw it with requires_grad_()"
            )
        span = space.spans[name]
        mask[span.start : span.stop] = True
    return mask


def _needed(train_loader: Iterable[Any] | None) -> Iterable[Any]:
    if train_loader is None:
        raise DataError("this mask looks at data, found train_loader=None; call select(train_loader)")
    return train_loader
