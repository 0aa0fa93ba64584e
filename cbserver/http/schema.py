"""The fields that clients may send, as pydantic checks and documents them; see docs/api.md."""
# A field that is known and not supported may be sent with the one value that changes nothing, as
# many clients do; any other value is refused by name. Fields that nobody knows are ignored.
import inspect
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator
from transformers import PreTrainedTokenizerBase

from ..model.logprobs import TOP
from ..model.sampling import SamplingParams
from .answers import MOST
from .errors import APIError
from .text import NESTING, each_prompt, nested
from .tools import call_format

# Of one conversation. Some templates look through all messages for each call.
MESSAGES = 2048
ROLES = 8  # different ones
CALLS = 256

# What apply_chat_template takes for itself is no variable of a template.
RESERVED = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
Nothing = Annotated[list, Field(max_length=0)]  # a list that may be sent, if it is empty
Empty = Annotated[dict, Field(max_length=0)]
Stop = Annotated[str, Field(max_length=1000)]
StopToken = Annotated[int, Field(ge=0)]
NO_GRAMMAR = "needs constrained decoding, which this server does not have"
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
    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="the likeliest tokens with this mass")
    top_k: int = Field(0, ge=-1, lt=2**31, description="the likeliest so many; 0, -1: all")
    seed: int | None = Field(None, ge=-2**63, lt=2**63, description="same seed, same answer; "
                             "-1: none")
    stop: Stop | Annotated[list[Stop], Field(max_length=64)] = Field([], description="ends before")
    stop_token_ids: Annotated[list[StopToken], Field(max_length=64, fail_fast=True)] = Field(
        [], description="tokens that end an answer, beside the model's own")
    min_tokens: int = Field(0, ge=0, description="nothing but max_tokens ends an answer before")
    min_p: float = Field(0.0, ge=0, le=1, description="tokens that are at least so likely, as a "
                         "share of the likeliest")
    ignore_eos: bool = Field(False, description="go on to max_tokens")
    stream: bool = Field(False, description="server-sent events, a chunk a token")
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1, le=MOST, description="answers to each prompt; with seed, answer k "
                   f"draws from seed + k; a request has at most {MOST} answers")
    logit_bias: Empty = {}
    presence_penalty: float = Field(0.0, ge=0, le=0)
    frequency_penalty: float = Field(0.0, ge=0, le=0)
    repetition_penalty: float = Field(1.0, ge=1, le=1)
    response_format: dict[str, Any] = Field({"type": "text"}, description='{"type": "text"} only')

    @field_validator("response_format", "tool_choice", "tools", "chat_template_kwargs",
                     mode="before", check_fields=False)
    @classmethod
    def shallow(cls, value):
        if nested(value):
            raise ValueError(f"it is nested deeper than {NESTING} levels")
        return value

    def sampling(self, engine, max_tokens):
        """What the engine is asked for, a SamplingParams; call `check` before."""
        if self.min_tokens > max_tokens:
            raise APIError(400, f"min_tokens: {self.min_tokens} is more than max_tokens "
                           f"{max_tokens}", "min_tokens")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        prompt_only = max_tokens == 0
        return SamplingParams(
            max_tokens=max(max_tokens, 1), temperature=self.temperature, top_p=self.top_p,
            top_k=max(self.top_k, 0), seed=None if self.seed == -1 else self.seed,
            stop=tuple(filter(None, stop)), ignore_eos=self.ignore_eos or prompt_only,
            min_p=self.min_p, min_tokens=self.min_tokens,
            stop_token_ids=tuple(self.stop_token_ids), logprobs=self.likeliest(), echo=self.echo,
            prompt_only=prompt_only, call_format=self.call_format(engine.tokenizer))

    def check(self, engine):
        """Refuse what can be refused by counting: before anything is tokenized or rendered."""
        prompts = self.prompt_count()
        limit = max(1, min(MOST, engine.max_waiting))
        if not 1 <= self.n * prompts <= limit:
            raise APIError(400, f"{prompts} prompts with n {self.n} ask for {self.n * prompts} "
                           f"answers; a request may have 1 to {limit}",
                           "n" if self.n > 1 else "prompt")
        kind = self.response_format.get("type")
        if kind != "text":
            raise APIError(400, f"response_format: {str(kind)[:100]!r} {NO_GRAMMAR}; ask for the "
                           "form in the prompt, and send \"text\" or nothing", "response_format")
        most = len(engine.tokenizer)
        if max(self.stop_token_ids, default=0) >= most:
            raise APIError(400, f"stop_token_ids: the vocabulary has ids under {most}",
                           "stop_token_ids")
        if self.likeliest() is not None and not engine.gives_logprobs:
            raise APIError(400, "logprobs: this server runs generate(), which gives none; start it "
                           "with --engine continuous", "logprobs")


class CompletionRequest(GenerationRequest):
    prompt: str | Tokens | Texts | Annotated[list[Tokens], Field(fail_fast=True)] = Field(
        description="text or token ids, or a list of them: each has its answer")
    max_tokens: int = Field(16, ge=0, description="at most so many; 0: none, for echo alone")
    best_of: Literal[1] = 1
    echo: bool = Field(False, description="the prompt first, with logprobs if they are asked for")
    logprobs: int | None = Field(None, ge=0, le=TOP, description="each token's log-probability, "
                                 "and those of so many likeliest; before temperature")
    suffix: Literal[""] = ""

    def prompt_count(self):
        return len(each_prompt(self.prompt))

    def check(self, engine):
        super().check(engine)
        if self.max_tokens == 0 and not self.echo:
            raise APIError(400, "max_tokens: 0 gives nothing but the prompt; send echo true with "
                           "it, or 1 and more", "max_tokens")

    def likeliest(self):
        """Of how many tokens log-probabilities are wanted beside the chosen one's; None: of none."""
        return self.logprobs

    def call_format(self, tokenizer):
        return None


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Called(Body):
    name: str
    arguments: str = ""


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: Called


class Message(Body):
    role: str = Field(max_length=64, description="system, user, assistant or tool, as the model's "
                                                 "template has it")
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=1024)] | None = Field(
        None, description="may be left out beside tool_calls")
    name: str | None = Field(None, description="for templates that show it")
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=CALLS)] = Field(
        [], description="what the assistant called, for templates that show it")
    tool_call_id: str | None = Field(None, description="which call a tool answers")

    @model_validator(mode="after")
    def says_something(self):
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content")
        return self


class Function(Body):
    model_config = ConfigDict(extra="allow")
    name: str = Field(min_length=1, max_length=64)


class Tool(Body):
    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: Function


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(
        min_length=1, max_length=MESSAGES,
        description=f"at most {ROLES} different roles, and {CALLS} tool_calls in all")
    max_tokens: int | None = Field(None, ge=1, description="at most so many; nothing: what the "
                                   "prompt leaves of the context")
    max_completion_tokens: int | None = Field(None, ge=1, description="max_tokens, renamed")
    add_generation_prompt: bool | None = Field(None, description="an answer begins after them; "
                                               "unless the last message goes on")
    continue_final_message: bool = Field(False, description="the answer goes on with the last one")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="variables of the model's chat template")
    logprobs: bool = Field(False, description="each token's log-probability, before temperature")
    top_logprobs: int = Field(0, ge=0, le=TOP, description="those of so many likeliest, too")
    echo: Literal[False] = False
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] = Field(
        [], description="what the model may call, if its chat template has a place for tools")
    tool_choice: str | dict[str, Any] = Field("auto", description="auto, or none: calls stay text")
    functions: Nothing = []
    function_call: Literal["none", "auto"] = "none"
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    web_search_options: None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] = ["text"]

    @field_validator("messages")
    @classmethod
    def few_roles_and_calls(cls, messages):
        roles = len({message.role for message in messages})
        calls = sum(len(message.tool_calls) for message in messages)
        if roles > ROLES:
            raise ValueError(f"{roles} different roles; a conversation may have {ROLES}")
        if calls > CALLS:
            raise ValueError(f"{calls} tool_calls; a conversation may have {CALLS}")
        return messages

    @field_validator("chat_template_kwargs")
    @classmethod
    def variables_only(cls, variables):
        taken = RESERVED & variables.keys()
        if taken:
            raise ValueError(f"{', '.join(sorted(taken))} is no variable of a template")
        return variables

    def prompt_count(self):
        return 1

    def check(self, engine):
        super().check(engine)
        if self.top_logprobs and not self.logprobs:
            raise APIError(400, "top_logprobs: send logprobs true with it", "top_logprobs")
        if self.tool_choice not in ("auto", "none"):
            raise APIError(400, f"tool_choice: {str(self.tool_choice)[:100]!r} {NO_GRAMMAR}; send "
                           "auto or none", "tool_choice")

    def likeliest(self):
        return self.top_logprobs if self.logprobs else None

    def call_format(self, tokenizer):
        """The format of calls that are looked for in the answer; None: all of it is text."""
        if not self.tools or self.tool_choice == "none":
            return None
        found = call_format(tokenizer, self.tool_dicts())
        if found is None:
            raise APIError(400, "tools: this model's chat template has calls in a format that this "
                           "server cannot read", "tools")
        return found

    def tool_dicts(self):
        return [tool.model_dump() for tool in self.tools]

    def template(self):
        """What the chat template takes beside the messages."""
        begin_answer = self.add_generation_prompt
        if begin_answer is None:
            begin_answer = not self.continue_final_message
        return {"add_generation_prompt": begin_answer, "tools": self.tool_dicts() or None,
                "continue_final_message": self.continue_final_message, **self.chat_template_kwargs}
