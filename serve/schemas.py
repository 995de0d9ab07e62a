"""Requests and responses of the API, as pydantic validates and OpenAPI documents them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Extra = Literal["ids", "trace", "reconstruction", "every_length", "attention"]
ImageFormat = Literal["png", "webp", "jpeg"]

ARROW, MSGPACK = "application/vnd.apache.arrow.stream", "application/msgpack"
"""Media types of encode responses beside JSON."""

CRITERION = Field(
    default=None,
    max_length=100,
    description="When an image has enough tokens: fixed:N, l1:T, mse:T, psnr:T, ssim:T, code:T, latent:T. The default "
    "is the model's own criterion.",
    examples=["l1:0.08", "fixed:32"],
)


class RequestBody(BaseModel):
    """The base of JSON request bodies, which rejects unknown fields."""

    model_config = ConfigDict(extra="forbid")


class ImageIn(RequestBody):
    """An image file."""

    data: str = Field(description="The file's bytes in base64: JPEG, PNG, WebP, GIF, BMP or TIFF.")
    id: str | None = Field(default=None, max_length=1000, description="Returned with the image's result.")


class EncodeRequest(RequestBody):
    """Images to encode."""

    model: str | None = Field(
        default=None, max_length=64, description="A name from /v1/models; the service's default model if omitted."
    )
    criterion: Annotated[str | None, CRITERION]
    max_tokens: int | None = Field(
        default=None, ge=1, description="The maximum code length, whatever the criterion requires."
    )
    returns: list[Extra] = Field(
        default=["ids"], alias="return", max_length=5, description="What to return in addition to lengths and scores."
    )
    images: list[ImageIn] = Field(min_length=1, max_length=4096, fail_fast=True)


class Tokens(RequestBody):
    """The tokens of one image."""

    ids: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=65536, fail_fast=True)


class DecodeRequest(RequestBody):
    """Tokens to decode, of mixed lengths."""

    model: str | None = Field(default=None, max_length=64, description="The model that encoded the tokens.")
    fingerprint: str | None = Field(
        default=None,
        max_length=64,
        description="The fingerprint of the weights that encoded the tokens; the request fails if the model's differs.",
    )
    format: ImageFormat = "png"
    images: list[Tokens] = Field(min_length=1, max_length=4096, fail_fast=True)


class Problem(BaseModel):
    """An RFC 9457 problem document: what is wrong and what would be valid."""

    type: str = Field(examples=["urn:alit:problem:not_an_image"])
    title: str
    status: int
    detail: str


class Length(BaseModel):
    """One image encoded at one length."""

    num_tokens: int
    ids: list[int]
    l1: float
    mse: float
    psnr: float
    ssim: float
    reconstruction: str = Field(description="A PNG file in base64.")


class Attention(BaseModel):
    """The attention maps of all tokens at one length."""

    num_tokens: int
    grid: int
    maps: str = Field(description="uint8 [num_tokens, grid, grid] in base64; 255 is the maximum of each token's map.")


class Result(BaseModel):
    """The tokens of one image, or the error."""

    index: int = Field(description="The image's position in the request.")
    id: str | None = None
    error: Problem | None = None
    num_tokens: int | None = None
    score: float | None = Field(default=None, description="The criterion's value at this length; null for fixed.")
    satisfied: bool | None = None
    width: int | None = Field(default=None, description="The width of the original image in pixels.")
    height: int | None = None
    ids: list[int] | None = None
    trace: list[float] | None = Field(default=None, description="The criterion's value at every length tried.")
    reconstruction: str | None = Field(default=None, description="A PNG file in base64.")
    every_length: list[Length] | None = None
    attention: list[Attention] | None = None
    input: str | None = Field(
        default=None, description="The square crop that the model encoded, with every_length: a PNG file in base64."
    )


class EncodeAnswer(BaseModel):
    """One result per image, in the request's order."""

    model: str
    fingerprint: str
    criterion: str
    results: list[Result]


class Model(BaseModel):
    """A model that requests can name."""

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
    """All models of the service, and the default one's name."""

    models: list[Model]
    default: str
