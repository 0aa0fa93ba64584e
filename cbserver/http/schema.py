"""The fields that clients may send, as pydantic checks and documents them; see docs/api.md."""
# A field that is known and not supported may be sent with the one value that changes nothing, as
# many clients do; any other value is refused by name. Fields that nobody knows are ignored.
import inspect
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, create_model, field_validator, model_validator
from transformers import PreTrainedTokenizerBase

from ..model.sampling import SamplingParams

# What apply_chat_template takes for itself is no variable of a template.
RESERVED = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
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


# Fields of other servers that would change an answer, with the value that leaves it as it is.
ELSEWHERE = {
    # an answer of a given form
    "structured_outputs": None, "guided_json": None, "guided_regex": None, "guided_choice": None,
    "guided_grammar": None, "guided_decoding_backend": None, "guided_whitespace_pattern": None,
    "grammar": None, "json_schema": None, "regex": None,
    # other ways to choose tokens
    "use_beam_search": False, "num_beams": 1, "length_penalty": 1.0, "early_stopping": False,
    "typical_p": 1.0, "top_a": 0.0, "tfs": 1.0, "mirostat": 0, "dry_multiplier": 0.0,
    "xtc_probability": 0.0, "bad_words": [], "allowed_token_ids": [], "logits_processors": [],
    # other lengths
    "max_new_tokens": None, "min_new_tokens": 0, "n_predict": None, "truncate_prompt_tokens": None,
    # other text of the same tokens, or another prompt
    "skip_special_tokens": True, "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False, "add_special_tokens": True, "prompt_logprobs": None,
    "chat_template": None, "documents": [], "reasoning": None, "thinking": None,
    "enable_thinking": None, "verbosity": None,
}


def only(value):
    """The type of a field that takes this one value."""
    if isinstance(value, float):
        return Annotated[float, Field(ge=value, le=value)]
    if value == []:
        return Nothing
    return None if value is None else Literal[value]


Elsewhere = create_model("Elsewhere", __base__=Body, **{
    name: (only(value), value) for name, value in ELSEWHERE.items()})


class GenerationRequest(Elsewhere):
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
    name: str | None = Field(None, description="for templates that show it")
    tool_calls: Nothing = []


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="max_tokens, renamed")
    add_generation_prompt: bool | None = Field(None, description="an answer begins after them; "
                                               "unless the last message goes on")
    continue_final_message: bool = Field(False, description="the answer goes on with the last one")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="variables of the model's chat template")
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

    @field_validator("chat_template_kwargs")
    @classmethod
    def variables_only(cls, variables):
        taken = RESERVED & variables.keys()
        if taken:
            raise ValueError(f"{', '.join(sorted(taken))} is no variable of a template")
        return variables

    def template(self):
        """What the chat template takes beside the messages."""
        begin_answer = self.add_generation_prompt
        if begin_answer is None:
            begin_answer = not self.continue_final_message
        return {"add_generation_prompt": begin_answer,
                "continue_final_message": self.continue_final_message, **self.chat_template_kwargs}
