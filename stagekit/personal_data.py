"""Likely personal data in a text: telephone numbers, identity cards, e-mail addresses, bank cards. Pure functions.

A number is told by its form and, where it has them, by its check digit, its date and its prefix. Whether a patient or
a ward answers it, no form tells; names and addresses have none and are not looked for. Medical texts are full of
numbers: what stands in a web address, a DOI or a registration number, and amounts with their unit, are passed over.
"""

import re
from dataclasses import dataclass
from datetime import date

MOBILE, ID_CARD, EMAIL = "mobile number", "ID-card number", "e-mail address"
TELEPHONE, BANK_CARD = "telephone number", "bank-card number"
KINDS = (MOBILE, ID_CARD, EMAIL, TELEPHONE, BANK_CARD)


@dataclass(frozen=True)
class PersonalData:
    """One find: its kind (of KINDS), the place of its first character, and what may be shown of it."""

    kind: str
    start: int
    masked: str


# Full-width characters, hyphens and blanks of all kinds as ASCII, one for one, so that places stay what they are.
_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_ASCII |= dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212"), "-")
_ASCII |= dict.fromkeys(map(ord, "\u3000\u00a0\u202f"), " ")

_BEFORE = r"(?<![A-Za-z0-9])(?<![0-9][-./_])(?<![A-Z]-)"  # not inside a word, a version, a code such as H-1234
_AFTER = r"(?![A-Za-z0-9]|[-/_][A-Za-z0-9]|\.[0-9])"
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9_%+][A-Za-z0-9._%+-]{0,63}@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![A-Za-z0-9])"
)
_ID_CARD = re.compile(rf"{_BEFORE}\d{{6}}(?P<sep>[ -]?)\d{{8}}(?P=sep)\d{{3}}[\dXx]{_AFTER}")
_BANK_CARD = re.compile(
    rf"{_BEFORE}(?:\d{{4}}(?P<sep>[ -]?)\d{{4}}(?P=sep)\d{{4}}(?P=sep)\d{{4}}(?:(?P=sep)\d{{1,3}})?"
    rf"|3[47]\d{{2}}(?P<gap>[ -]?)\d{{6}}(?P=gap)\d{{5}}){_AFTER}"
)
_MOBILE = re.compile(rf"{_BEFORE}(?:(?:\+|00)?86[ -]?)?1[3-9]\d(?P<sep>[ -]?)\d{{4}}(?P=sep)\d{{4}}{_AFTER}")
_TELEPHONE = re.compile(
    rf"{_BEFORE}(?:"
    r"\+[1-9]\d{0,2}(?:[ -]?\(\d{1,5}\)[ -]?|[ -])?\d(?:[ -]?\d){5,13}"  # +49 (30) 901820
    r"|\(0\d{2,3}\) ?\d{7,8}|0\d{2,3}[ -]\d{7,8}"  # (010) 65521234, 0755-86521234
    r"|(?:\([2-9]\d\d\) ?|[2-9]\d\d-)[2-9]\d\d-\d{4}"  # (555) 234-5678
    rf"){_AFTER}"
)
# What looks like a number of a person and is none: it is blanked before numbers are looked for.
_CODES = re.compile(
    r"(?:https?://|www\.)[^\s<>\"'，。；、（）()]+"
    r"|\b10\.\d{4,9}/[^\s<>\"'，。；]+"
    r"|(?:准字|注册证(?:编)?号|注准|备案(?:凭证)?(?:编)?号|批准文号|批号|条形?码|货号"
    r"|\b(?:ISBN|ISSN|PMID|PMCID|CAS|GTIN|EAN|UDI|NDC|DOI|NCT|ChiCTR|ISRCTN|Lot|Batch)(?: No\.?)?)"
    r"[为是: #.-]{0,3}[A-Za-z]{0,4}-?\d[\d-]*",
    re.IGNORECASE,
)
_UNIT = re.compile(
    r" ?(?:(?:[mkμµn]?g|mcg|[mdμµ]?L|k?IU|U|CFU|copies|cells|[mμµn]?mol|元|拷贝|[毫微]?克|毫?升|国际单位)(?![A-Za-z])"
    r"|[%‰×^])",
    re.IGNORECASE,
)
# Before a number without blanks: part of a sum, or negative.
_RECKONED = re.compile(r"(?:[\d)]\s?[=+*/×÷-]\s?|(?:^|[\s=(])-)$")
_FILES = ("png", "jpg", "jpeg", "gif", "svg", "webp", "py", "js", "json", "html")  # logo@2x.png is no address
_DOCUMENTATION = re.compile(r"(?:^|\.)(?:example\.(?:com|org|net)|example|test|invalid|localhost)$")  # RFC 2606
_FREE_OF_CHARGE = ("400", "800")  # lines of companies

# Provinces by the first two digits (GB/T 2260); 81 to 83: residence permits of Hong Kong, Macao, Taiwan.
_PROVINCES = {
    *("11", "12", "13", "14", "15", "21", "22", "23", "31", "32", "33", "34", "35", "36", "37", "41", "42", "43"),
    *("44", "45", "46", "50", "51", "52", "53", "54", "61", "62", "63", "64", "65", "71", "81", "82", "83"),
}
# Country codes of ITU-T E.164; North America and Russia have numbers of eleven digits with theirs.
_COUNTRIES = re.compile(
    r"[17]\d{10}$|2[07]|3[0-469]|4[0134-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]"
    r"|2[1-689]\d|3[578]\d|42\d|5[09]\d|6[7-9]\d|8[578]\d|9[679]\d"
)


def find_personal_data(text: str) -> list[PersonalData]:
    """Find what is likely to be personal in a text, in order of place; the values themselves are not returned."""
    text, found = text.translate(_ASCII), []

    def take(kind, matches):
        """Note matches down and give the text without them, so that no digit is counted twice."""
        found.extend(PersonalData(kind, match.start(), mask(kind, match.group())) for match in matches)
        return _blanked(text, matches)

    if "@" in text:
        text = take(EMAIL, [match for match in _EMAIL.finditer(text) if is_email(match.group())])
    text = _blanked(text, list(_CODES.finditer(text)))
    for kind, (pattern, holds) in _NUMBERS.items():
        matches = [match for match in pattern.finditer(text) if not _is_amount(text, match)]
        text = take(kind, [match for match in matches if holds(_digits(match.group()))])
    return sorted(found, key=lambda item: item.start)


def _blanked(text, matches):
    parts, position = [], 0
    for match in matches:
        parts += [text[position : match.start()], " " * len(match.group())]
        position = match.end()
    return "".join([*parts, text[position:]])


def _is_amount(text, match):
    value, start = match.group(), match.start()
    before = text[max(0, start - 4) : start] + value[: value.startswith("+")]
    reckoned = " " not in value and "-" not in value and _RECKONED.search(before)
    return bool(reckoned or _UNIT.match(text, match.end()))


def _digits(value):
    return "".join(char for char in value if char.isdigit() or char in "Xx+")


def is_email(address: str) -> bool:
    """Whether something with an @ between a name and a domain can be a person's address."""
    name, domain = address.lower().rsplit("@", 1)
    if name in ("git", "noreply", "no-reply") or domain.rpartition(".")[2] in _FILES:
        return False
    if len(name) == 1 and len(domain.partition(".")[0]) == 1:  # a@b.com
        return False
    return not _DOCUMENTATION.search(domain)


def is_id_card(digits: str) -> bool:
    """Whether 18 characters are a Chinese identity number: a province, a date of birth, and the check of GB 11643.

    The digits weighted by 2^(17-i) add up to 1 mod 11, where X is ten (ISO 7064, MOD 11-2).
    """
    if len(digits) != 18 or digits[:2] not in _PROVINCES:
        return False
    try:
        born = date(int(digits[6:10]), int(digits[10:12]), int(digits[12:14]))
    except ValueError:
        return False
    values = [10 if char in "Xx" else int(char) for char in digits]
    checked = sum(value * pow(2, 17 - place, 11) for place, value in enumerate(values)) % 11 == 1
    return checked and date(1900, 1, 1) <= born <= date.today()


def passes_luhn(digits: str) -> bool:
    """Whether the last digit checks the others (ISO/IEC 7812-1): every second one from the right counts twice."""
    total = 0
    for place, char in enumerate(reversed(digits)):
        value = int(char) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def is_bank_card(digits: str) -> bool:
    """Whether digits are a payment card: prefix and length of an issuer, and Luhn's check digit."""
    length = len(digits)
    issued = (
        (digits.startswith(("60", "62", "9558")) and 16 <= length <= 19)  # UnionPay and older Chinese cards
        or (digits.startswith("4") and length in (16, 19))  # Visa
        or (length == 16 and (51 <= int(digits[:2]) <= 55 or 2221 <= int(digits[:4]) <= 2720))  # Mastercard
        or (length == 16 and (3528 <= int(digits[:4]) <= 3589 or digits.startswith(("644", "65"))))  # JCB, Discover
        or (length == 15 and digits.startswith(("34", "37")))  # American Express
    )
    return issued and passes_luhn(digits)


def is_mobile(digits: str) -> bool:
    """Whether digits of the right form are no round amount: 13800000000."""
    return not digits.endswith("00000")


def is_telephone(digits: str) -> bool:
    """Whether digits, behind a + with a country code, can be a subscriber's number; none in use has more than 13."""
    if digits.startswith("+"):
        return 8 <= len(digits) - 1 <= 13 and bool(_COUNTRIES.match(digits[1:]))
    return not digits.startswith(_FREE_OF_CHARGE)


_NUMBERS = {
    ID_CARD: (_ID_CARD, is_id_card),
    BANK_CARD: (_BANK_CARD, is_bank_card),
    MOBILE: (_MOBILE, is_mobile),
    TELEPHONE: (_TELEPHONE, is_telephone),
}


def mask(kind: str, value: str) -> str:
    """What may be shown of a value: of a number five characters at most, of an address two letters and the ending."""
    if kind == EMAIL:
        name, domain = value.rsplit("@", 1)
        return f"{name[0]}***@{domain[0]}***.{domain.rpartition('.')[2]}"
    places = [place for place, char in enumerate(value) if char.isalnum()]
    hidden = set(places[3:-2])
    return "".join("*" if place in hidden else char for place, char in enumerate(value))
