"""Measurements of single images, on their way from workers."""

from __future__ import annotations

import numpy as np
from image_files import blob_images

from jobs.evaluation.per_image import BatchMeasurements, MeasurementCollector, Measurements, RejectedImage, measure


def test_collector_restores_batches_in_order(models):
    """Measurements of workers arrive unchanged, count once and are put in order."""
    measured = measure(models, blob_images(4), np.array([True, False, True, False]))
    again = Measurements.unpack(measured.pack())
    for name, expected, found in zip(Measurements._fields, measured, again, strict=True):
        assert np.array_equal(expected, found), name
        assert expected.dtype == found.dtype
    assert len(measured.codec_bytes) == 2
    collected = MeasurementCollector()
    reject = RejectedImage("a.jpg", "empty", "no bytes")
    parts = [BatchMeasurements(0, measured, []), BatchMeasurements(1, measured._replace(l1=measured.l1 + 1), [reject])]
    for part in (parts[1], parts[0], parts[1]):
        collected.add(part)
    assert collected.processed == 9
    assert collected.rejects == [reject]
    assert np.array_equal(collected.measurements().l1, np.concatenate([measured.l1, measured.l1 + 1]))
