"""Several adapters for one model, of which one is active."""

from __future__ import annotations

import os
from pathlib import Path

from paddle import nn

from peft_deploy.adapters.lora.attachment import Attachment, for_model
from peft_deploy.adapters.lora.loading import load_into
from peft_deploy.adapters.lora.ranks import read_for
from peft_deploy.config import LoRAConfig
from peft_deploy.errors import AdapterError


class NamedAdapters:
    """The part of LoRAModel that keeps adapters by name.

    An adapter that is not active takes the memory of its A and B and of the whole tensors that it
    carries. The parameters of each stay the same objects, whatever is active.
    """

    model: nn.Layer
    _adapters: dict[str, Attachment]
    _active: str

    @property
    def active_adapter(self) -> str:
        """The name of the adapter that counts."""
        return self._active

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters."""
        return list(self._adapters)

    def load_adapter(
        self,
        path: str | os.PathLike[str],
        name: str,
        lora_config: LoRAConfig | None = None,
    ) -> None:
        """Reads a further adapter; it becomes active with :meth:`set_adapter`.

        Args:
            path: its folder.
            name: a name that is not taken.
            lora_config: in place of the folder's ``lora_config.json``.

        Raises:
            AdapterError: the name is taken, or the adapter does not fit. The model is unchanged
                then.
        """
        if name in self._adapters:
            raise AdapterError(
                f"there is an adapter {name!r} already",
                hint="delete_adapter() it, or use another name",
            )
        adapter = read_for(self.model, Path(path), lora_config)
        current = self._adapters[self._active]
        config = for_model(adapter.config, self.model)
        merged = current.merged
        current.detach()
        try:
            attachment = Attachment.create(self.model, config, quiet=True)
            load_into(attachment, adapter)
        finally:
            current.attach()
            if merged:
                current.merge()
        self._adapters[name] = attachment

    def set_adapter(self, name: str) -> None:
        """Makes another adapter the active one, unmerged; a disabled model stays disabled.

        Raises:
            AdapterError: no adapter has this name.
        """
        chosen = self._adapters.get(name)
        if chosen is None:
            raise AdapterError(
                f"there is no adapter {name!r}; the names are {', '.join(self._adapters)}"
            )
        current = self._adapters[self._active]
        if chosen is current:
            return
        disabled = current.disabled
        current.detach()
        (chosen.disable if disabled else chosen.enable)()
        chosen.attach()
        self._active = name
        self.mark_only_lora_as_trainable()

    def delete_adapter(self, name: str) -> None:
        """Forgets an adapter that is not active.

        Raises:
            AdapterError: no adapter has this name, or it is the active one.
        """
        if name not in self._adapters:
            raise AdapterError(
                f"there is no adapter {name!r}; the names are {', '.join(self._adapters)}"
            )
        if name == self._active:
            raise AdapterError(
                f"the adapter {name!r} is active",
                hint="set_adapter() another one first, or restore_original_model()",
            )
        del self._adapters[name]

    def mark_only_lora_as_trainable(self) -> None:
        """Freezes everything but the active adapter."""
        raise NotImplementedError
