"""Prompts: named texts that are put before a model's texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..reading import OptionError, shown


class Prompted:
    """`prompts` and `default_prompt_name` of a model, as in sentence-transformers. The next call uses what is set."""

    # Names that every model of a class has; the prompt is empty unless the repository or the user gives another.
    usual_prompts: ClassVar[tuple[str, ...]] = ()
    _prompts: dict[str, str]
    _default_prompt_name: str | None = None

    @property
    def prompts(self) -> dict[str, str]:
        """Names and texts. Raises OptionError if set to anything but a mapping of str to str."""
        return self._prompts

    @prompts.setter
    def prompts(self, value: Mapping[str, str]) -> None:
        if not isinstance(value, Mapping) or not all(isinstance(item, str) for pair in value.items() for item in pair):
            raise OptionError(f"prompts is {shown(value)}; it must map names to strings")
        self._prompts = dict(value)

    @property
    def default_prompt_name(self) -> str | None:
        """The prompt that is used if a call names none. Raises OptionError if set to an unknown name."""
        return self._default_prompt_name

    @default_prompt_name.setter
    def default_prompt_name(self, value: str | None) -> None:
        if value is not None:
            self._prompt_named(value, "default_prompt_name")
        self._default_prompt_name = value

    def _resolve_prompt(self, name: str | None, prompt: str | None) -> str:
        """The text to put first: `prompt`; else the prompt with that name; else the default one; else ""."""
        if prompt is not None:
            if not isinstance(prompt, str):
                raise TypeError(f"prompt is {type(prompt).__name__} ({shown(prompt)}); it must be a str")
            return prompt
        if name is not None:
            return self._prompt_named(name, "prompt_name")
        default = self.default_prompt_name  # `prompts` may have been set without it since
        return "" if default is None else self._prompt_named(default, "default_prompt_name")

    def _prompt_named(self, name: str, option: str) -> str:
        known = {**dict.fromkeys(self.usual_prompts, ""), **self._prompts}
        if name not in list(known):
            have = shown(sorted(self._prompts)) if self._prompts else "no prompts"
            raise OptionError(f"{option} is {shown(name)}; this model has {have}")
        if not isinstance(known[name], str):  # the mapping was written to
            raise OptionError(f"the prompt {shown(name)} is {shown(known[name])}; it must be a str")
        return known[name]
