"""Check an installation without extras: the core works and a missing extra gives the one clear error."""

import importlib

import numpy as np

import gte_rag

encoder = gte_rag.GTEEncoder.from_pretrained()
encoding = encoder.encode_documents(["Bread needs flour, water and salt.", "面包需要面粉、水和盐。"])
assert encoding.dense is not None, "no dense vectors"
assert encoding.sparse is not None, "no sparse vectors"
assert encoding.dense.shape == (2, encoder.dimension), encoding.dense.shape
assert np.allclose(np.linalg.norm(encoding.dense, axis=1), 1, atol=1e-5), "not unit vectors"
assert all(len(vector) for vector in encoding.sparse), "an empty sparse vector"

for module, extra in (
    ("gte_rag.chroma", "chroma"),
    ("langchain_gte", "langchain"),
    ("llama_index.embeddings.gte", "llama-index"),
    ("llama_index.postprocessor.gte", "llama-index"),
    ("llama_index.retrievers.gte", "llama-index"),
    ("llama_index.vector_stores.gte", "llama-index"),
):
    try:
        importlib.import_module(module)
    except gte_rag.MissingExtraError as error:
        assert f"pip install 'gte-rag[{extra}]'" in str(error), error
        print(f"{module}: {error}")
    else:
        raise SystemExit(f"{module} was imported without its extra; is this a plain installation?")
