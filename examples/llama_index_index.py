"""LlamaIndex: build a vector index, save it, load it, and ask it; then ask the hybrid retriever the same."""

from pathlib import Path
from tempfile import TemporaryDirectory

import chromadb
from llama_index.core import Document, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.node_parser import SentenceSplitter

from gte_rag import HybridCollection
from llama_index.embeddings.gte import GTEEmbedding
from llama_index.retrievers.gte import GTEHybridRetriever

DOCUMENTS = [
    Document(text="Die Waschmaschine zeigt E-104, wenn der Zulaufhahn geschlossen ist.", metadata={"device": "washer"}),
    Document(text="The dishwasher shows E-207 when the filter is clogged.", metadata={"device": "dishwasher"}),
    Document(text="Le lave-linge doit être détartré deux fois par an.", metadata={"device": "washer"}),
]
QUESTION = "What does E-104 mean?"

embed_model = GTEEmbedding()  # instead of HuggingFaceEmbedding(...)

with TemporaryDirectory() as folder:
    index = VectorStoreIndex.from_documents(DOCUMENTS, embed_model=embed_model)
    index.storage_context.persist(folder)
    print(f"saved {len(list(Path(folder).iterdir()))} files")
    loaded = load_index_from_storage(StorageContext.from_defaults(persist_dir=folder), embed_model=embed_model)
    print("dense: ", loaded.as_retriever(similarity_top_k=1).retrieve(QUESTION)[0].text)

collection = HybridCollection(chromadb.EphemeralClient(), "devices-example", encoder=embed_model.encoder)
hybrid = GTEHybridRetriever(collection, similarity_top_k=1)
hybrid.add_nodes(SentenceSplitter(chunk_size=128, chunk_overlap=0).get_nodes_from_documents(DOCUMENTS))
print("hybrid:", hybrid.retrieve(QUESTION)[0].text)
