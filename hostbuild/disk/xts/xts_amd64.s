#include "textflag.h"

// What doubling a tweak folds back in: 0x87 into the low end for the bit that
// leaves at the top, and the low half's top bit into the high half.
DATA fold<>+0(SB)/8, $0x87
DATA fold<>+8(SB)/8, $1
GLOBL fold<>(SB), RODATA|NOPTR, $16

// LOAD takes a block, XORs it with the tweak in X8, keeps that on the stack, and
// doubles it.
#define LOAD(off, X) \
	MOVOU  off(DI), X; \
	PXOR   X8, X; \
	MOVOU  X8, off(SP); \
	PSHUFD $0x13, X8, X9; \
	PSRAL  $31, X9; \
	PAND   X10, X9; \
	PADDQ  X8, X8; \
	PXOR   X9, X8

#define EACH(OP) \
	OP X15, X0; \
	OP X15, X1; \
	OP X15, X2; \
	OP X15, X3; \
	OP X15, X4; \
	OP X15, X5; \
	OP X15, X6; \
	OP X15, X7

#define ROUND(off) \
	MOVOU off(AX), X15; \
	EACH(AESENC)

#define STORE(off, X) \
	MOVOU off(SP), X9; \
	PXOR  X9, X; \
	MOVOU X, off(DI)

// func encryptBlocks(keys *[240]byte, tweak *[16]byte, data *byte, groups int)
TEXT ·encryptBlocks(SB), NOSPLIT, $128-32
	MOVQ  keys+0(FP), AX
	MOVQ  tweak+8(FP), BX
	MOVQ  data+16(FP), DI
	MOVQ  groups+24(FP), CX
	MOVOU (BX), X8
	MOVOU fold<>(SB), X10

loop:
	LOAD(0, X0)
	LOAD(16, X1)
	LOAD(32, X2)
	LOAD(48, X3)
	LOAD(64, X4)
	LOAD(80, X5)
	LOAD(96, X6)
	LOAD(112, X7)
	MOVOU 0(AX), X15
	EACH(PXOR)
	ROUND(16)
	ROUND(32)
	ROUND(48)
	ROUND(64)
	ROUND(80)
	ROUND(96)
	ROUND(112)
	ROUND(128)
	ROUND(144)
	ROUND(160)
	ROUND(176)
	ROUND(192)
	ROUND(208)
	MOVOU 224(AX), X15
	EACH(AESENCLAST)
	STORE(0, X0)
	STORE(16, X1)
	STORE(32, X2)
	STORE(48, X3)
	STORE(64, X4)
	STORE(80, X5)
	STORE(96, X6)
	STORE(112, X7)
	ADDQ  $128, DI
	DECQ  CX
	JNZ   loop
	RET

// func subWord(w uint32) uint32
TEXT ·subWord(SB), NOSPLIT, $0-12
	MOVL            w+0(FP), AX
	MOVD            AX, X0
	PSHUFD          $0, X0, X0
	AESKEYGENASSIST $0, X0, X1
	MOVD            X1, AX
	MOVL            AX, ret+8(FP)
	RET
