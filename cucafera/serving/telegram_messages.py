"""The commands of the Telegram bot, and its sentences: in Catalan, the language of the model."""

GREETING = "Hola, amb què et puc ajudar?"
FORGOTTEN = "Ja no recordo res."
HELP = """Escriu-me i et respondré. També entenc aquestes ordres:
/reseteja: oblido la conversa (o /reset)
/repeteix: torno a respondre a l'últim missatge (o /redo)
/para: deixo d'escriure la resposta (o /stop)
/ajuda: mostro aquesta llista (o /help)
/start: et saludo (o /hello)"""
HELP_FOR_OWNERS = f"""{HELP}
/system TEXT: canvio el missatge de sistema d'aquest xat; sense TEXT, el mostro; amb un guió (-), l'esborro"""
UNKNOWN_COMMAND = "No conec aquesta ordre. /ajuda mostra les que entenc."
NOTHING_TO_REDO = "No recordo cap missatge a què pugui tornar a respondre."
NOTHING_TO_STOP = "Ara mateix no escric cap resposta."
STOPPED = "D'acord, ho deixo."
EMPTY = "No m'ha sortit cap resposta. Prova /repeteix, o pregunta-m'ho amb unes altres paraules."
ONLY_TEXT = "Només entenc missatges de text."
EDITED = "No torno a llegir els missatges editats: envia'm el text de nou, si us plau."
ONLY_OWNERS = "El missatge de sistema només el pot veure i canviar qui em fa funcionar."
SYSTEM_IS = "El missatge de sistema d'aquest xat és:\n{}"
NO_SYSTEM = "Aquest xat no té missatge de sistema."
NOT_ALLOWED = "No tinc permís per parlar en aquest xat. Qui em fa funcionar me'l pot donar amb aquest número: {}"
TOO_FAST = "Vas massa de pressa per a mi. Torna-ho a provar d'aquí a {} s."
TOO_LONG = "Aquest missatge és massa llarg per a mi: escurça'l, si us plau."
BUSY = "Ara mateix tinc massa gent esperant. Torna-ho a provar d'aquí a una estona."
SHUTTING_DOWN = "M'aturen abans que et pugui respondre. Torna-m'ho a preguntar d'aquí a una estona."
FAILED = "No he pogut respondre. Torna-ho a provar, si us plau."

COMMANDS = {
    "start": "start", "hello": "start",
    "reset": "reset", "reseteja": "reset",
    "redo": "redo", "repeteix": "redo",
    "stop": "stop", "para": "stop",
    "help": "help", "ajuda": "help",
    "system": "system",
}  # fmt: skip
"""Each command, by all its names."""
MENU = {
    "reseteja": "oblido la conversa",
    "repeteix": "torno a respondre a l'últim missatge",
    "para": "deixo d'escriure la resposta",
    "ajuda": "mostro les ordres que entenc",
}
"""The commands that Telegram offers while a person types, and their meaning."""
