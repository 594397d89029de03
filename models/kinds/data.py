"""The kinds as data."""
# fmt: off

from __future__ import annotations

from ..specs import Entry, Integers, Mask, Normal, Values

HERE = "xdit_ir.models.kinds"
TOKENS = Normal((2, 64, 4))
IMAGE = Normal((2, 4, 16, 16))
WORDS = Normal((2, 256, 32))


def _kind(path: str, **inputs: object) -> Entry:
    return Entry(cls=f"{HERE}.{path}", tiny_inputs=inputs, no_denoiser="a kind of code")


_PACKED = dict(x=TOKENS, t=Values([0.75, 0.25]), text=Normal((2, 16, 32)), mask=Mask(16, (12, 9), "bool"))
_CACHE = [{name: Normal((2, 4, 192, 8)) for name in "kv"} for _ in range(3)]
_SAMPLES = [0] * 24 + [1] * 40
_PLACES = [[False] * 8 + [True] * 48 + [False] * 8, [True] * 48 + [False] * 16]

KINDS = {
    "kind-symmetric-pairs": _kind("reads:SymmetricPairs", x=TOKENS, pairs=Normal((64, 64))),
    "kind-finite-only": _kind("reads:FiniteOnly", x=IMAGE, t=Values([0.75, 0.25])),
    "kind-library-decoder": _kind("reads:LibraryDecoder", x=TOKENS, text=Normal((2, 16, 32))),
    "kind-extra-for-noisy": _kind("reads:ExtraForNoisy", x=TOKENS, t=Normal((2, 64))),
    "kind-noisy-and-clean": _kind("reads:NoisyAndClean", x=TOKENS, t=Normal((2, 64))),
    "kind-routed": _kind("reads:Routed", x=TOKENS),
    "kind-chunked-layers": _kind("reads:ChunkedLayers", x=TOKENS),
    "kind-object-leaves": _kind("leaves:ObjectLeaves", x=TOKENS),
    "kind-few-rows": _kind("leaves:FewRows", x=Normal((1, 66, 4)), cameras=Normal((1, 3, 4)), t=Values([0.75])),
    "kind-masked-tokens": _kind("batches:MaskedTokens", ids=Integers((2, 64), 100)),
    "kind-tokens-and-step": _kind(
        "batches:TokensAndStep", codes=Integers((2, 8, 8), 129), label=Values([3, 7], "int64"),
        step=Values([750, 250], "int64")),
    "kind-packed-samples": _kind(
        "batches:PackedSamples", x=Normal((64, 4)), sample=Values(_SAMPLES, "int64"), t=Values([0.75, 0.25])),
    "kind-packed-lengths": _kind(
        "batches:PackedLengths", x=Normal((64, 4)), lengths=Values([30, 34], "int64"), t=Values([0.75, 0.25])),
    "kind-packed-batch": _kind("batches:PackedBatch", **_PACKED),
    "kind-packed-text": _kind("batches:PackedText", **_PACKED),
    "kind-packed-joint": _kind("batches:PackedJoint", **_PACKED),
    "kind-mask-through-expand": _kind("batches:MaskThroughExpand", x=TOKENS, there=Mask(64, (60, 49), "bool")),
    "kind-casts-itself": _kind("fills:CastsItself", x=TOKENS, t=Values([0.75, 0.25])),
    "kind-fills-table": _kind("fills:FillsTable", x=TOKENS),
    "kind-fills-from-weights": _kind("fills:FillsFromWeights", x=TOKENS),
    "kind-fills-every-time": _kind("fills:FillsEveryTime", x=TOKENS),
    "kind-images-in-text": _kind(
        "places:ImagesInText", ids=Integers((2, 64), 100), image=Normal((2, 48, 4)), where=Values(_PLACES, "bool")),
    "kind-interleaved": _kind("places:Interleaved", left=TOKENS, right=TOKENS),
    "kind-by-modality": _kind("places:ByModality", x=TOKENS, kind=Integers((64,), 2)),
    "kind-texts-of-lengths": _kind(
        "places:TextsOfLengths", x=TOKENS, text=Normal((2, 16, 32)), mask=Mask(16, (9, 16))),
    "kind-pieces-of-samples": _kind(
        "places:PiecesOfSamples", x=[Normal((64, 4)), Normal((64, 4))], text=[Normal((16, 32)), Normal((11, 32))]),
    "kind-scanned": _kind("places:Scanned", x=IMAGE),
    "kind-local-keys": _kind("windows:LocalKeys", x=TOKENS),
    "kind-keys-of-halves": _kind("windows:KeysOfHalves", x=Normal((2, 96, 4))),
    "kind-shifted-windows": _kind("windows:ShiftedWindows", x=IMAGE),
    "kind-neighbourhood": _kind("windows:Neighbourhood", x=IMAGE),
    "kind-relative-shift": _kind("windows:RelativeShift", x=TOKENS),
    "kind-padded-shift": _kind("windows:PaddedShift", x=TOKENS),
    "kind-padded-stream": _kind("balance:PaddedStream", x=Normal((2, 80, 4))),
    "kind-refined-stream": _kind("balance:RefinedStream", x=Normal((2, 80, 4)), text=Normal((2, 16, 32))),
    "kind-masked-text": _kind(
        "balance:MaskedText", x=TOKENS, words=WORDS, mask=Mask(256, (20, 9))),
    "kind-lengths-of-text": _kind(
        "padding:LengthsOfText", x=TOKENS, words=WORDS, lengths=Values([20, 9], "int64")),
    "kind-pooled-text": _kind("padding:PooledText", x=TOKENS, words=WORDS, mask=Mask(256, (20, 9))),
    "kind-hidden-by-lowest": _kind("padding:HiddenByLowest", x=TOKENS, words=WORDS, mask=Mask(256, (20, 9))),
    "kind-hidden-by-thousands": _kind(
        "padding:HiddenByThousands", x=TOKENS, words=WORDS, lengths=Values([20, 9], "int64")),
    "kind-returned-text": _kind("padding:ReturnedText", x=TOKENS, words=WORDS, mask=Mask(256, (20, 9))),
    "kind-sound-and-picture": _kind("balance:SoundAndPicture", sound=Normal((2, 16, 4)), picture=Normal((2, 240, 4))),
    "kind-convolved-tokens": _kind("sequences:ConvolvedTokens", x=TOKENS),
    "kind-mixer": _kind("sequences:MixerLayers", x=TOKENS),
    "kind-state-space": _kind("sequences:StateSpace", x=TOKENS),
    "kind-recurrent": _kind("sequences:Recurrent", x=TOKENS),
    "kind-cumulative-scan": _kind("sequences:CumulativeScan", x=TOKENS),
    "kind-causal-video": _kind("causal:CausalVideo", x=TOKENS, cache=_CACHE, note={}, chunk=1, write=False),
    "kind-causal-video-written": _kind("causal:CausalVideo", x=TOKENS, cache=_CACHE, note={}, chunk=1, write=True),
    "kind-flex-bias": _kind("operators:FlexBias", x=TOKENS),
    "kind-vectorised": _kind("operators:Vectorised", x=TOKENS, scale=Values([0.75, 0.25])),
    "kind-differentiated": _kind("operators:Differentiated", x=TOKENS),
    "kind-transformed": _kind("operators:Transformed", x=TOKENS),
    "kind-capped-scores": _kind("operators:CappedScores", x=TOKENS),
    "kind-scan-operator": _kind("operators:ScanOperator", x=TOKENS),
    "kind-while-operator": _kind("operators:WhileOperator", x=TOKENS),
    "kind-eight-bits": _kind("operators:EightBits", x=TOKENS),
    "kind-eight-bit-integers": _kind("operators:EightBitIntegers", x=TOKENS),
    "kind-grouped-product": _kind("operators:GroupedProduct", x=TOKENS),
}
