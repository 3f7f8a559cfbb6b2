"""Models that see, in small and with random weights: a LLaVA for every test, and the other families' ways of
handing over a picture. Nothing is downloaded; the tokenizer is a byte-level one, built here."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (CLIPImageProcessorPil, CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast)

from transformer2_nbdev.tasks import Task

COLOURS = "red", "green", "blue", "white"
TEMPLATE = """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['content'] is string %}{{ m['content'] }}\
{% else %}{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}\
{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>"]


def tokenizer(special=SPECIAL, template=TEMPLATE):
    "A byte-level tokenizer with a token for each place of a picture"
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(["Which colour is it? red green blue white"], trainers.BpeTrainer(
        vocab_size=len(special) + 270, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, clean_up_tokenization_spaces=False,
                                   bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>",
                                   additional_special_tokens=[s for s in special if s not in ("<pad>",)])


TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=2048, initializer_range=.2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
TOWER = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=8)


def llava(seed=0, size=32, attend="sdpa"):
    "A LLaVA of two layers and its processor; a picture becomes (size / 8)^2 tokens"
    tok, side = tokenizer(), dict(height=size, width=size)
    processor = LlavaProcessor(CLIPImageProcessorPil(size=side, crop_size=side), tok, patch_size=8, chat_template=TEMPLATE,
                               vision_feature_select_strategy="default", num_additional_image_tokens=1)
    config = LlavaConfig(vision_config=CLIPVisionConfig(image_size=size, **TOWER), text_config=LlamaConfig(vocab_size=len(tok), **TEXT),
                         image_token_id=tok.convert_tokens_to_ids("<image>"), tie_word_embeddings=False)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():     # pictures that the language model cannot overlook
        for p in model.model.multi_modal_projector.parameters(): p.normal_(0, .5)
    model.generation_config = GenerationConfig(eos_token_id=2, bos_token_id=1, pad_token_id=0)
    return model, processor


def picture(colour, size=(32, 32)): return Image.new("RGB", size, colour)


def ask(text, *pictures):
    "A prompt: messages in TRL's form"
    parts = [dict(type="image", image=p) for p in pictures]
    return [dict(role="user", content=[*parts, dict(type="text", text=text)])] if parts else [dict(role="user", content=text)]


def colours(n=12, prompt=lambda e: ask("Which colour is it?", e["image"]), size=(32, 32)):
    "A task: name a picture's colour. The reward counts an easy thing, so that a random model earns some"
    rows = [dict(image=picture(COLOURS[i % 4], size), colour=COLOURS[i % 4], i=i) for i in range(n)]
    reward = lambda said, e: 1. if any(c in said for c in e["colour"]) else -1.
    return Task("colours", lambda split: rows, prompt, reward, answer=lambda e: e["colour"], max_new_tokens=8)

# The other families -------------------------------------------------------------------------------------------------------------------------------------

SHOW = "{{ '%s' if p['type'] == 'image' else p['text'] }}"


def shows(token): return TEMPLATE.replace("{{ '<image>' if p['type'] == 'image' else p['text'] }}", SHOW % token)


def settle(model, seed=0):
    "A random model whose answers depend on what it sees"
    g = torch.Generator().manual_seed(seed)
    connector = [m for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in ("multi_modal_projector", "connector", "merger")]
    with torch.no_grad():
        for m in connector:
            for p in m.parameters(): p.normal_(0, .5, generator=g)
    model.generation_config = GenerationConfig(eos_token_id=2, bos_token_id=1, pad_token_id=0)
    return model.eval()


def llava_next(seed=0):
    "Pictures cut into tiles: pixels are (pictures, most tiles, 3, H, W), with the pictures' sizes beside them"
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil, LlavaNextProcessor
    tok, side, grid = tokenizer(), dict(height=16, width=16), [[16, 32], [32, 16], [32, 32]]
    pixels = LlavaNextImageProcessorPil(size=dict(shortest_edge=16), crop_size=side, image_grid_pinpoints=grid)
    processor = LlavaNextProcessor(pixels, tok, patch_size=8, chat_template=TEMPLATE, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    config = LlavaNextConfig(vision_config=CLIPVisionConfig(image_size=16, **TOWER), text_config=LlamaConfig(vocab_size=len(tok), **TEXT),
                             image_grid_pinpoints=grid, image_token_id=tok.convert_tokens_to_ids("<image>"), tie_word_embeddings=False)
    torch.manual_seed(seed)
    return settle(LlavaNextForConditionalGeneration(config)), processor


def qwen(seed=0):
    "Pixels are one long list of patches, with a grid for each picture; positions in three directions"
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil
    from transformers.processing_utils import ProcessorMixin
    class Reader(Qwen2_5_VLProcessor):    # without the part that reads films, which needs torchvision
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
    tok = tokenizer(SPECIAL[:3] + ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"], shows("<|vision_start|><|image_pad|><|vision_end|>"))
    pixels = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=dict(shortest_edge=8 * 8, longest_edge=64 * 64))
    processor = Reader(pixels, tok, chat_template=tok.chat_template)
    of = tok.convert_tokens_to_ids
    text = {k: v for k, v in TEXT.items()} | dict(vocab_size=len(tok), rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]))
    vision = dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, out_hidden_size=32, fullatt_block_indexes=[1], window_size=16)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=of("<|image_pad|>"), video_token_id=of("<|video_pad|>"),
                              vision_start_token_id=of("<|vision_start|>"), vision_end_token_id=of("<|vision_end|>"), tie_word_embeddings=False)
    torch.manual_seed(seed)
    return settle(Qwen2_5_VLForConditionalGeneration(config)), processor


def idefics3(seed=0, family="Idefics3"):
    "Pixels are (prompts, most tiles, 3, H, W), with a mask; SmolVLM is the same under another name"
    import transformers
    cells = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    tok = tokenizer([*SPECIAL, "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *cells])
    pixels = transformers.Idefics3ImageProcessorPil(size=dict(longest_edge=32), max_image_size=dict(longest_edge=16))
    processor = transformers.Idefics3Processor(pixels, tok, image_seq_len=1, chat_template=TEMPLATE)
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    kind = lambda end: getattr(transformers, family + end)
    config = kind("Config")(vision_config=kind("VisionConfig")(**vision), text_config=LlamaConfig(vocab_size=len(tok), **TEXT), scale_factor=2,
                            image_token_id=tok.convert_tokens_to_ids("<image>"), pad_token_id=0, tie_word_embeddings=False)
    torch.manual_seed(seed)
    return settle(kind("ForConditionalGeneration")(config)), processor


def smolvlm(seed=0): return idefics3(seed, "SmolVLM")


def paligemma(seed=0):
    "A prompt that is read in both directions, told by token types; no chat template"
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor, SiglipImageProcessorPil
    tok, side = tokenizer(template=None), dict(height=16, width=16)
    pixels = SiglipImageProcessorPil(size=side)
    pixels.image_seq_length = 4
    processor = PaliGemmaProcessor(pixels, tok)
    vision = dict(model_type="siglip_vision_model", projection_dim=32, image_size=16, **TOWER)
    config = PaliGemmaConfig(vision_config=vision, text_config=GemmaConfig(vocab_size=len(tok), head_dim=8, **TEXT), projection_dim=32, hidden_size=32,
                             image_token_id=tok.convert_tokens_to_ids("<image>"))
    torch.manual_seed(seed)
    return settle(PaliGemmaForConditionalGeneration(config)), processor


FAMILIES = dict(llava=llava, llava_next=llava_next, qwen=qwen, idefics3=idefics3, smolvlm=smolvlm, paligemma=paligemma)
