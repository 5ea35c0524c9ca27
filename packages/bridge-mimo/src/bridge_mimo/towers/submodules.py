"""The modality submodule that runs an encoder on every pipeline stage of its component.

Imported lazily: it subclasses mcore's class.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules  # noqa: TID253 - base class
from torch import Tensor

from bridge_core.errors import ConfigError


class TowerSubmodules(VisionModalitySubmodules):
    """mcore's `VisionModalitySubmodules`, for one encoder that may be cut into pipeline stages.

    mcore's own runs encoders on the first stage and on later ones takes what it is sent for their result
    (0.19.2, models/mimo/submodules/base.py, `ModalitySubmodules.forward`). Here a later stage gives it to the
    encoder (`set_input_tensor`) and runs that as well. Every stage needs the encoder's inputs: grids of images
    say where frames begin and end.
    """

    def forward(
        self, encoder_inputs: dict[str, Any] | None = None, hidden_states: Tensor | None = None
    ) -> Tensor | None:
        """Run this stage.

        Args:
            encoder_inputs: arguments of the encoder, under its name; None where a batch has no images.
            hidden_states: what the stage before gave; None on the first.

        Returns:
            What the next stage takes, or on the last the embeddings [tokens, width]; None where there are no
            images. An empty tensor that another stage sent for such a batch is passed on.

        Raises:
            ConfigError: a later stage has inputs and no hidden states, or the other way round.
        """
        if self.is_first_stage and self.is_last_stage:
            return super().forward(encoder_inputs=encoder_inputs, hidden_states=hidden_states)
        if encoder_inputs is None and (hidden_states is None or not hidden_states.numel()):
            return hidden_states
        name, encoder = self._encoder()
        inputs = (encoder_inputs or {}).get(name)
        if inputs is None or (hidden_states is None) is not self.is_first_stage:
            raise ConfigError(
                "a stage of an encoder lacks what it computes from",
                where=f"encoder {name}",
                expected="its inputs on every stage, and hidden states on every stage but the first",
                got=f"inputs: {inputs is not None}, hidden states: {hidden_states is not None}",
                fix="give every stage of the images component the same modality inputs",
            )
        if hidden_states is not None:
            encoder.set_input_tensor(hidden_states)
        output = encoder(**inputs)
        return self.project_embeddings([output], is_input=True) if self.is_last_stage else output

    def _encoder(self) -> tuple[str, Any]:
        if len(self.encoders) != 1:
            raise ConfigError(
                "encoders in several pipeline stages come one to a component",
                where="encoders",
                expected="one",
                got=list(self.encoders) or "none",
                fix="give each encoder a component of its own, or pp=1",
            )
        return next(iter(self.encoders.items()))
