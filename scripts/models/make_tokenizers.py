"""Makes the tokenizers of the tiny models: python make_tokenizers.py MODELS_DIR SHAKESPEARE.txt

tiny-llama and tiny-mistral get the same sentencepiece BPE with byte fallback, as Llama 2 has it; tiny-mpt gets a
byte-level BPE, as GPT-NeoX has it. Each tokenizer.json is byte for byte that of tests/models.
"""

import os
import random
import shutil
import sys

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPTNeoXTokenizerFast, LlamaTokenizerFast

import corpus

VOCABULARY = 2048
CONTEXT = 1024

# Llama's turns. The begin token stands in the template, as in Llama 2's.
LLAMA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only the roles user and assistant are known to this model.') }}{% endif %}{% endfor %}"
)
# MPT's turns, in the instruction form.
MPT_TEMPLATE = (
    "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\\n\\n' }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only the roles user and assistant are known to this model.') }}{% endif %}{% endfor %}"
)


def main(out, plays_file):
    with open(plays_file) as file:
        documents = training_text(file.read())
    llama_style(documents, out, ["tiny-llama", "tiny-mistral"])
    mpt_style(documents, os.path.join(out, "tiny-mpt"))


def training_text(plays):
    """Documents as the models see them, and more of the plays and of the plain questions than they see."""
    r = random.Random(7)
    chunks = corpus.play_chunks(plays)
    documents = [corpus.doc(r, chunks, turns=True) for _ in range(12000)]
    return documents + chunks + [f"{q} {a}" for q, a in [corpus.qa(r) for _ in range(8000)]]


def llama_style(documents, out, names):
    made = os.path.join(out, "spm")
    lines = [line for document in documents for line in document.split("\n") if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=made,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        max_sentence_length=8192,
        input_sentence_size=60000,
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    for name in names:
        folder = os.path.join(out, name)
        os.makedirs(folder, exist_ok=True)
        shutil.copy(made + ".model", os.path.join(folder, "tokenizer.model"))
        tokenizer = LlamaTokenizerFast(
            vocab_file=os.path.join(folder, "tokenizer.model"),
            legacy=True,
            add_prefix_space=True,
            add_bos_token=True,
            add_eos_token=False,
        )
        save(tokenizer, LLAMA_TEMPLATE, folder)


def mpt_style(documents, folder):
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=2032,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    # Runs of 9 to 2 spaces, as GPT-NeoX has them.
    bpe.add_tokens([AddedToken(" " * n, normalized=True) for n in range(9, 1, -1)])
    os.makedirs(folder, exist_ok=True)
    bpe.save(os.path.join(folder, "tokenizer.json"))
    end = "<|endoftext|>"
    tokenizer = GPTNeoXTokenizerFast(
        tokenizer_file=os.path.join(folder, "tokenizer.json"), bos_token=end, eos_token=end, unk_token=end
    )
    save(tokenizer, MPT_TEMPLATE, folder)


def save(tokenizer, template, folder):
    tokenizer.chat_template = template
    tokenizer.model_max_length = CONTEXT
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)
    print(folder, len(tokenizer), tokenizer.tokenize("Hello, I'm a model\n12 é    x"))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
