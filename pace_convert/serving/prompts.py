"""Prompts as token ids, as the engines that see them whole would have them."""

from __future__ import annotations

import inspect
from typing import Any

from .errors import ApiError, unsupported
from .requests import ChatRequest, CompletionRequest

NOT_TEXT = "uncountable"


class Prompts:
    """tokenizer: of the model. vocabulary: ids that the model has. most: tokens of a prompt."""

    def __init__(self, tokenizer: Any, vocabulary: int, most: int) -> None:
        self.tokenizer, self.vocabulary, self.most = tokenizer, vocabulary, most
        # Arguments of the method itself, another template among them, are not a client's to give.
        self.not_theirs = set(inspect.signature(tokenizer.apply_chat_template).parameters)

    def of(self, request: ChatRequest | CompletionRequest) -> list[list[int]]:
        """Ids of each prompt of a request. Raises ApiError for what can't be one."""
        if isinstance(request, ChatRequest):
            return [self._checked(self._chat(request), "messages")]
        given: Any = request.prompt
        several = isinstance(given, list) and not all(isinstance(part, int) for part in given)
        prompts = given if several else [given]
        return [self._checked(self._ids(prompt), "prompt") for prompt in prompts]

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return self._read(prompt, special=True) if isinstance(prompt, str) else prompt

    def _chat(self, request: ChatRequest) -> list[int]:
        if not self.tokenizer.chat_template:
            raise ApiError(
                400, "this model has no chat template; use /v1/completions", param="messages"
            )
        turns = [_as_text(message) for message in request.messages]
        more = request.chat_template_kwargs or {}
        for name in more.keys() & self.not_theirs:
            raise unsupported(f"chat_template_kwargs.{name}", "here")
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                tools=request.others.get("tools"),
                tokenize=False,
                add_generation_prompt=True,
                **more,
            )
        except Exception as error:  # a template raises what it likes
            reason = " ".join(str(error).split())[:300]
            raise ApiError(
                400, f"the chat template does not take these messages: {reason}", param="messages"
            ) from error
        return self._read(text, special=False)

    def _read(self, text: str, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ApiError(400, "the text has lone surrogates, so it is no Unicode") from error
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise ApiError(400, "the prompt has no token", param=param)
        if max(ids) >= self.vocabulary:
            raise ApiError(
                400, f"token id {max(ids)}: the model has {self.vocabulary}", param=param
            )
        if len(ids) > self.most:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens, at most {self.most} are read here",
                param=param,
                code="context_length_exceeded",
            )
        return ids


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is text, also where it came in parts. Raises ApiError for other
    parts.
    """
    if not isinstance(message.get("role"), str):
        raise ApiError(400, "a message has no role", param="messages")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            raise ApiError(400, f"content of type {kind} is not read", param="messages",
                code=NOT_TEXT)  # fmt: skip
        texts.append(text)
    return {**message, "content": "".join(texts)}
