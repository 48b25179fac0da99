"""Compares candidates with their reference: perplexity and KL divergence, in one pass or by llama-perplexity. May
import what lies below lab; offers evaluate.evaluate and scores.Evaluation."""
