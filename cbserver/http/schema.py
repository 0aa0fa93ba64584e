"""The fields that clients may send, as pydantic checks and documents them; see API.md."""
# A field that is known and not supported may be sent with the one value that changes nothing, as
# many clients do; any other value is refused by name. Fields that nobody knows are ignored.
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from ..model.sampling import SamplingParams

Nothing = Annotated[list, Field(max_length=0)]  # a list that may be sent, if it is empty
Empty = Annotated[dict, Field(max_length=0)]
Stop = Annotated[str, Field(max_length=1000)]
# Of a million wrong entries one is reported: a list of errors could be larger than memory.
Tokens = Annotated[list[int], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


class Body(BaseModel):
    """A JSON body. Clients send null for what they leave open: it means the default."""

    @model_validator(mode="before")
    @classmethod
    def null_means_default(cls, body):
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}


class StreamOptions(Body):
    include_usage: bool = Field(False, description="a last chunk with the token counts")


class GenerationRequest(Body):
    """What completions and chat have in common. Fields with one value are known, not supported."""

    model: str | None = Field(None, description="the served model's name, or nothing")
    max_tokens: int | None = Field(None, ge=1, description="at most so many; completions: 16, "
                                   "chat: what the prompt leaves of the context")
    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="the likeliest tokens with this mass")
    top_k: int = Field(0, ge=-1, lt=2**31, description="the likeliest so many; 0, -1: all")
    seed: int | None = Field(None, ge=-2**63, lt=2**63, description="same seed, same answer")
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = Field([], description="ends before")
    ignore_eos: bool = Field(False, description="go on to max_tokens")
    stream: bool = Field(False, description="server-sent events, a chunk a token")
    stream_options: StreamOptions = StreamOptions()
    n: Literal[1] = 1
    logit_bias: Empty = {}
    presence_penalty: float = Field(0.0, ge=0, le=0)
    frequency_penalty: float = Field(0.0, ge=0, le=0)
    repetition_penalty: float = Field(1.0, ge=1, le=1)
    min_p: float = Field(0.0, ge=0, le=0)
    min_tokens: Literal[0] = 0
    stop_token_ids: Nothing = []
    response_format: dict[Literal["type"], Literal["text"]] = {"type": "text"}

    def sampling(self, max_tokens):
        """What the engine is asked for: a SamplingParams."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return SamplingParams(
            max_tokens=max_tokens, temperature=self.temperature, top_p=self.top_p,
            top_k=max(self.top_k, 0), seed=self.seed, stop=tuple(filter(None, stop)),
            ignore_eos=self.ignore_eos)


class CompletionRequest(GenerationRequest):
    prompt: str | Tokens | Texts | Annotated[list[Tokens], Field(fail_fast=True)] = Field(
        description="text or token ids; a list of prompts may hold one")
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    logprobs: None = None
    suffix: Literal[""] = ""


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: str = Field(description="system, user or assistant, as the model's template has it")
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    tool_calls: Nothing = []


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="max_tokens, renamed")
    logprobs: Literal[False] = False
    top_logprobs: Literal[0] = 0
    tools: Nothing = []
    tool_choice: Literal["none", "auto"] = "none"
    functions: Nothing = []
    function_call: Literal["none", "auto"] = "none"
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    web_search_options: None = None
    modalities: list[Literal["text"]] = ["text"]
