"""Where preference pairs come from and how images or clips are prepared: the `data` part of a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FormatName = Literal["auto", "pickapic", "chosen_rejected", "folder", "scored"]
Side = Annotated[int, Field(ge=8, multiple_of=8)]


class DataConfig(BaseModel):
    """One source of preference pairs, in the words of the diffusers scripts.

    Attributes:
        dataset_name: A data set of the Hub, a local folder (parquet, JSON, images with metadata, or one written by
            `save_to_disk`) or a local parquet, JSON or arrow file.
        train_data_dir: A local folder instead; with an `index.jsonl` or `index.parquet` its rows name image files.
        dataset_config_name: Configuration of a Hub data set that has several.
        split: Split to read.
        streaming: Read row by row without downloading the whole data set first.
        format: What the columns mean; "auto" decides by their names. "scored" is for single images with rewards, and is
            what "auto" means to methods that learn from those.
        index: Index file of `train_data_dir`, if it is not called index.jsonl or index.parquet.
        caption_column: Column of the prompts; default `caption` for Pick-a-Pic, else `prompt`.
        chosen_column: Column of the preferred images or clips.
        rejected_column: Column of the other images or clips; not needed by methods that learn from winners.
        image_column: Column of a scored image or clip; default `image`, or `video` if there is only that.
        reward_columns: Numbers of a row, larger is better. Of a scored image its rewards, default `reward`. Of a pair,
            how much better the chosen image is, dimension by dimension: 0 is a tie, below 0 the rejected one is better.
        image_0_column: First image or clip of a Pick-a-Pic row.
        image_1_column: Second image or clip of a Pick-a-Pic row.
        label_column: 1 if the first one won, 0 if the second, 0.5 for a tie.
        weight_column: Column of weights in the loss; used if it is there, required if set.
        id_column: Column of unique row names; default `id` if there is one (Pick-a-Pic: the row number).
        drop_identical: Drop rows whose `are_different` is false: the same picture twice.
        max_train_samples: Keep only the first so many pairs.
        resolution: Side of the training images in pixels, or [height, width]; None takes the model's own.
        aspect_ratio_buckets: Keep the proportions of images: each pair goes to the size nearest in aspect ratio to its
            chosen image, among those whose area is that of `resolution`, and batches are of one size. Both halves get
            that size, cropped in the centre.
        bucket_step: Sides of those sizes are multiples of so many pixels.
        fps: Frames per second that clips are read at, as many as `model.num_frames`; None takes the model's own.
        center_crop: Crop the centre. If false, for clips only, both clips of a pair are cropped at one place, drawn for
            the pair once and for all; for images, whose random crops change at every visit, this is refused.
        random_flip: Mirror both halves of a pair at half of their visits; contradicts prompts with left and right.
        cache_dir: Where downloaded data sets are kept; None is the folder of the `datasets` library.
        encoded_dir: Where encoded latents and prompts are kept; None leaves the choice to the caller.
        cache: Keep the moments of the posterior and draw from them at each visit, or one frozen sample.
        cache_dtype: Type of the cached latents and embeddings on disk; arithmetic is float32 either way.
        encode_batch_size: Images or clips per call of the autoencoder while the cache is made; None takes 8 images or
            1 clip.
        max_corrupt_fraction: More unreadable pairs than this fraction stop the run.
        check_source: Read the data at every start, to see that the encoded ones are still theirs: labels and ids, and
            of a folder with an index all images. False takes the cache that a run with these settings has finished,
            whatever has become of the data since, which need not be there any more; the start then takes the same time
            for any number of pairs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset_name: str | None = None
    train_data_dir: Path | None = None
    dataset_config_name: str | None = None
    split: str = "train"
    streaming: bool = False
    format: FormatName = "auto"
    index: str | None = None
    caption_column: str | None = None
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    image_column: str | None = None
    reward_columns: tuple[str, ...] = ()
    image_0_column: str = "jpg_0"
    image_1_column: str = "jpg_1"
    label_column: str = "label_0"
    weight_column: str | None = None
    id_column: str | None = None
    drop_identical: bool = False
    max_train_samples: int | None = Field(default=None, ge=1)
    resolution: Side | tuple[Side, Side] | None = None
    aspect_ratio_buckets: bool = False
    bucket_step: int = Field(default=64, ge=16, multiple_of=16)
    fps: float | None = Field(default=None, gt=0, le=1000, allow_inf_nan=False)
    center_crop: bool = True
    random_flip: bool = False
    cache_dir: Path | None = None
    encoded_dir: Path | None = None
    cache: Literal["moments", "sample"] = "moments"
    cache_dtype: Literal["float32", "bfloat16"] = "float32"
    encode_batch_size: int | None = Field(default=None, ge=1)
    max_corrupt_fraction: float = Field(default=0.01, ge=0.0, le=1.0)
    check_source: bool = True

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            found = "neither" if self.dataset_name is None else "both"
            raise ValueError(f"data needs dataset_name or train_data_dir, found {found}; set exactly one")
        if self.index is not None and self.train_data_dir is None:
            raise ValueError(f"index {self.index!r} names a file of train_data_dir, which is not set")
        return self

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels, None where the model decides."""
        side = self.resolution
        return (side, side) if isinstance(side, int) else side
