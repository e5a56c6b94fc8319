"""From a row of GSM8K to the answer of its question with another number.

expressions → program (the data flow of one solution) → mentions, constants, prose, wording (what
the texts say) → slots with rules (which numbers may become X) → recomputation with value_rules
(which values may) → substitution and rewriting (the new question, solution and code).
"""
