"""Benchmarks of models that were tuned for one task: captions, icons, knowledge, book covers."""

from covft.evaluation import OCRVQA, OKVQA, COCOCaptions, Flickr30k, IconQA

evaluation = dict(
    benchmarks=[
        dict(type=Flickr30k),
        dict(type=COCOCaptions),
        dict(type=IconQA),
        dict(type=OKVQA),
        dict(type=OCRVQA),
    ],
    data_root="data",
    batch_size=16,
)
