"""To the Hugging Face hub and back: a stock checkpoint, a model card, and a record of what was done to the weights."""

from gradsurgery.hub.card import model_card
from gradsurgery.hub.publish import load_record, push_to_hub, save_pretrained
from gradsurgery.hub.record import record_of

__all__ = ["load_record", "model_card", "push_to_hub", "record_of", "save_pretrained"]
