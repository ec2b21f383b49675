"""The parameters of a request that the server accepts. It refuses all others, and values that would have no effect."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Json, Tag, ValidationError, model_validator

from .errors import refused


Text = Annotated[str, Field(min_length=1)]
Object = dict[str, Any]
Stop = Text | Annotated[list[Text], Field(min_length=1)]
Arguments = Json[Object] | Object


class Fields(BaseModel):
    """Parameters of one object. null is the same as leaving a parameter out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class Part(Fields):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] = []
    logprobs: Annotated[list[Any], Field(max_length=0)] = []


class Function(Fields):
    """A function that the model called."""

    name: str
    arguments: Arguments


class ToolCall(Fields):
    """A call of a function."""

    id: str = ""
    type: Literal["function"] = "function"
    function: Function


class Described(BaseModel):
    """A function that the model may call. The chat template reads its other parameters, too."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    description: str = ""
    parameters: Object = {}


class Tool(Fields):
    """A tool, in `/v1/chat/completions`."""

    type: Literal["function"]
    function: Described


class ItemTool(Described):
    """A tool, in `/v1/responses`."""

    type: Literal["function"]


class Message(Fields):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] = ""
    tool_calls: list[ToolCall] = []
    tool_call_id: str = ""
    reasoning_content: str = ""
    annotations: Annotated[list[Any], Field(max_length=0)] = []


class ItemMessage(Fields):
    """A message, in `/v1/responses`."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part]
    id: str = ""
    status: str = ""


class ItemCall(Fields):
    """A call of a function, in `/v1/responses`."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Json[Object]
    id: str = ""
    status: str = ""


class ItemResult(Fields):
    """What a function returned, in `/v1/responses`."""

    type: Literal["function_call_output"]
    call_id: str
    output: str
    id: str = ""
    status: str = ""


class ItemReasoning(Fields):
    """Earlier reasoning, in `/v1/responses`."""

    type: Literal["reasoning"]
    content: list[Object] = []
    summary: list[Any] = []
    id: str = ""
    status: str = ""


def _kind(item: Any) -> Any:
    return item.get("type", "message") if isinstance(item, dict) else "message"


Item = Annotated[
    Annotated[ItemMessage, Tag("message")]
    | Annotated[ItemCall, Tag("function_call")]
    | Annotated[ItemResult, Tag("function_call_output")]
    | Annotated[ItemReasoning, Tag("reasoning")],
    Discriminator(_kind),
]


class Shared(Fields):
    """What all three endpoints accept. Labels (`user`, `metadata`) are accepted, because they change nothing anyway."""

    model: str = ""
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=1, lt=2**31)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    user: str = ""


class Chat(Shared):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] = 1
    max_completion_tokens: Annotated[int, Field(ge=1)] = 1
    stop: Stop = []
    tools: list[Tool] = []
    chat_template_kwargs: Object = {}
    stream_options: Object = {}  # the last chunk of a stream always has the usage
    metadata: Object = {}
    # These have no effect at these values, and would need support at others.
    n: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logit_bias: Annotated[Object, Field(max_length=0)] = {}
    logprobs: Literal[False] = False
    tool_choice: Literal["auto"] = "auto"
    parallel_tool_calls: Literal[True] = True
    store: Literal[False] = False


class Completion(Shared):
    """`/v1/completions`."""

    prompt: Text
    max_tokens: Annotated[int, Field(ge=1)] = 1
    stop: Stop = []
    stream_options: Object = {}
    n: Literal[1] = 1
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logit_bias: Annotated[Object, Field(max_length=0)] = {}


class Responses(Shared):
    """`/v1/responses`."""

    input: Text | Annotated[list[Part], Field(min_length=1)] | Annotated[list[Item], Field(min_length=1)]
    instructions: str = ""
    max_output_tokens: Annotated[int, Field(ge=1)] = 1
    tools: list[ItemTool] = []
    chat_template_kwargs: Object = {}
    metadata: Object = {}
    background: Literal[False] = False
    store: Literal[False] = False
    tool_choice: Literal["auto"] = "auto"
    parallel_tool_calls: Literal[True] = True
    truncation: Literal["disabled"] = "disabled"


def check(fields: type[Fields], body: dict[str, Any]) -> None:
    """Check the body of a request, and remove parameters that are null.

    Raises:
        HTTPException: 400; a parameter is unknown, has a wrong value, or is missing.
    """
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        lone = error.object[error.start]
        raise refused(f"The body has {lone!a}, half of a surrogate pair, which is no text: remove it.") from None
    try:
        fields.model_validate(body)
    except ValidationError as error:
        # Of the alternatives that a value may be, the one that went deepest is meant, or whose type is right.
        found = max(error.errors(include_url=False), key=lambda one: (len(one["loc"]), "_type" not in one["type"]))
        path, value = _path(body, found["loc"])
        param = re.match(r"\w*", path)
        raise refused(_sentence(path, value, found["type"], found["msg"]), param and param[0]) from None
    for name in [name for name, value in body.items() if value is None]:
        del body[name]


def _sentence(path: str, value: Any, kind: str, reason: str) -> str:
    if kind == "extra_forbidden":
        return f"{path} is not supported: remove it."
    if kind == "missing":
        return f"{path} is missing: add it."
    if kind == "literal_error":
        return f"{path}={_short(value)} is not supported: use {reason.partition('should be ')[2]}."
    reason = re.sub(r"^\w+ should (be|have) ", r"must \1 ", reason).partition(" after validation")[0]
    return f"{path}={_short(value)} {reason}: change it."


def _path(body: Any, place: tuple[int | str, ...]) -> tuple[str, Any]:
    """Where an error is, such as `messages[0].role`, and the value there.

    Args:
        place: keys and indices, among them names of alternatives, which the body does not have.
    """
    path, value = "", body
    for number, key in enumerate(place):
        is_last = number == len(place) - 1
        if isinstance(key, int) and isinstance(value, list) and key < len(value):
            path, value = f"{path}[{key}]", value[key]
        elif isinstance(key, str) and isinstance(value, dict) and (key in value or is_last):
            path, value = f"{path}.{key}" if path else key, value.get(key)
    return path, value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
