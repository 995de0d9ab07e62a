"""What goes over the wire: requests and answers of the API, as pydantic checks and OpenAPI documents them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Extra = Literal["ids", "trace", "reconstruction", "every_length", "attention"]
ImageFormat = Literal["png", "webp", "jpeg"]

CRITERION = Field(
    default=None,
    max_length=100,
    description="When an image has enough tokens: fixed:N, l1:T, mse:T, psnr:T, ssim:T, code:T, latent:T; the model's "
    "own default when not given.",
    examples=["l1:0.08", "fixed:32"],
)


class Request(BaseModel):
    """A request's body; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class ImageIn(Request):
    """An image file."""

    data: str = Field(description="The file's bytes in base64: JPEG, PNG, WebP, GIF, BMP or TIFF.")
    id: str | None = Field(default=None, max_length=1000, description="Given back with the result.")


class EncodeRequest(Request):
    """Images to encode."""

    model: str | None = Field(
        default=None, max_length=64, description="One of /v1/models; the default one when not given."
    )
    criterion: Annotated[str | None, CRITERION]
    max_tokens: int | None = Field(
        default=None, ge=1, description="The longest code to give, whatever the criterion says."
    )
    returns: list[Extra] = Field(
        default=["ids"], alias="return", max_length=5, description="What to give beside lengths and scores."
    )
    images: list[ImageIn] = Field(min_length=1, max_length=4096, fail_fast=True)


class Tokens(Request):
    """One image's tokens."""

    ids: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=65536, fail_fast=True)


class DecodeRequest(Request):
    """Tokens to decode, of mixed lengths."""

    model: str | None = Field(default=None, max_length=64, description="The model that made the tokens.")
    fingerprint: str | None = Field(
        default=None, max_length=64, description="Of the weights that made the tokens: others are refused."
    )
    format: ImageFormat = "png"
    images: list[Tokens] = Field(min_length=1, max_length=4096, fail_fast=True)


class Problem(BaseModel):
    """RFC 9457: what was wrong, and what would be right."""

    type: str = Field(examples=["urn:alit:problem:not_an_image"])
    title: str
    status: int
    detail: str


class Length(BaseModel):
    """One length of a code."""

    num_tokens: int
    ids: list[int]
    l1: float
    mse: float
    psnr: float
    ssim: float
    reconstruction: str = Field(description="A PNG file in base64.")


class Attention(BaseModel):
    """What every token of one length looks at."""

    num_tokens: int
    grid: int
    maps: str = Field(description="uint8 [num_tokens, grid, grid] in base64, 255 where a token looks most.")


class Result(BaseModel):
    """One image's tokens, or why there are none."""

    index: int = Field(description="Which of the request's images this is.")
    id: str | None = None
    error: Problem | None = None
    num_tokens: int | None = None
    score: float | None = Field(default=None, description="The criterion's value at this length; null for fixed.")
    satisfied: bool | None = None
    width: int | None = Field(default=None, description="Of the image as it was given.")
    height: int | None = None
    ids: list[int] | None = None
    trace: list[float] | None = Field(default=None, description="The criterion's value at every length tried.")
    reconstruction: str | None = Field(default=None, description="A PNG file in base64.")
    every_length: list[Length] | None = None
    attention: list[Attention] | None = None
    input: str | None = Field(
        default=None, description="The square that the model saw, with every_length: a PNG in base64."
    )


class EncodeAnswer(BaseModel):
    """One result per image, in the request's order."""

    model: str
    fingerprint: str
    criterion: str
    results: list[Result]


class Model(BaseModel):
    """Weights that can be asked for."""

    name: str
    fingerprint: str
    image_size: int
    lengths: list[int]
    codebook_size: int
    latents_per_iteration: int
    base_grid: int
    default_criterion: str
    criteria: list[str]


class Models(BaseModel):
    """All of them."""

    models: list[Model]
    default: str
