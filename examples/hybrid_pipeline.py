"""Hybrid retrieval with the core only: index texts, search with a filter, see why each hit was found."""

import chromadb

from gte_rag import GTEEncoder, HybridCollection, HybridRetriever

TEXTS = {
    "dns": ("computing", "NXDOMAIN is the answer of a name server that knows no host of this name."),
    "port": ("computing", "ECONNREFUSED means that nothing listens on the port you tried to reach."),
    "brot": ("cooking", "Sauerteig braucht zwölf Stunden bei Zimmertemperatur, bevor das Brot in den Ofen kommt."),
    "pain": ("cooking", "La baguette se mange le jour même ; le pain au levain se garde une semaine."),
    "lune": ("astronomy", "Callisto est la plus lointaine des quatre grandes lunes de Jupiter."),
}

encoder = GTEEncoder.from_pretrained()  # "Alibaba-NLP/gte-multilingual-base" for real work
collection = HybridCollection(chromadb.EphemeralClient(), "hybrid-example", encoder=encoder)
collection.upsert(
    list(TEXTS),
    [text for _, text in TEXTS.values()],
    metadatas=[{"topic": topic} for topic, _ in TEXTS.values()],
)
retriever = HybridRetriever(collection, k=2)

for question, where in (
    ("What does ECONNREFUSED mean?", None),
    ("Wie lange braucht Sauerteig?", {"topic": "cooking"}),
    ("moons of Jupiter: Callisto", None),
):
    print(f"\n{question}")
    for hit in retriever.search(question, where=where):
        matched = ", ".join(f"{match.token} {match.weight:.2f}" for match in hit.matches)
        print(
            f"  {hit.score:5.2f} = {hit.dense_score:.2f} + 0.3 × {hit.sparse_score:.2f}  {hit.text}\n         [{matched}]"
        )
