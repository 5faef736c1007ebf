"""A LangChain chain: hybrid retriever, prompt, model.

The model here only repeats the best passage, so that the example runs offline; put any chat model in its place.
"""

import chromadb
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from gte_rag import GTEEncoder, HybridCollection
from langchain_gte import GTEHybridRetriever

DOCUMENTS = [
    Document("The library is open from 9 to 18 o'clock, on Saturdays until noon.", metadata={"page": 1}),
    Document("Eine verlorene Lesekarte ersetzt die Ausleihe für fünf Euro.", metadata={"page": 2}),
    Document("Les livres se rendent aussi la nuit, dans la boîte près de l'entrée.", metadata={"page": 3}),
]


def numbered(documents: list[Document]) -> str:
    """Write the passages below each other, best first."""
    return "\n".join(f"[{document.metadata['page']}] {document.page_content}" for document in documents)


def first_passage(prompt: PromptValue) -> str:
    """Stand in for a chat model: quote the first passage of the prompt."""
    return next(line for line in prompt.to_string().splitlines() if line.startswith("["))


collection = HybridCollection(chromadb.EphemeralClient(), "library-example", encoder=GTEEncoder.from_pretrained())
retriever = GTEHybridRetriever.from_documents(DOCUMENTS, collection=collection, k=2)
prompt = ChatPromptTemplate.from_messages(
    [("system", "Answer from these passages only:\n{context}"), ("human", "{question}")]
)
chain = (
    {"context": retriever | RunnableLambda(numbered), "question": RunnablePassthrough()}
    | prompt
    | RunnableLambda(first_passage)
    | StrOutputParser()
)

for question in ("When is the library open?", "Was kostet eine neue Lesekarte?", "Où rendre les livres la nuit ?"):
    print(f"{question}\n  {chain.invoke(question)}")
